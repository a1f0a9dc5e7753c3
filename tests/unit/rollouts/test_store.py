"""Records come back as they were written, and are there whole or not at all."""

from __future__ import annotations

import base64
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from keel.rollouts.store import (
    RecordError,
    read_step_record,
    read_trajectories,
    trajectory_from_json,
    trajectory_to_json,
    write_step_record,
    write_trajectories,
)
from keel.types import Message, Routes, SamplingSettings, Segment, Task, TokenSpan, Trajectory, Turn

STREAMS = {
    "input_ids": np.arange(7, dtype=np.int64),
    "rollout_logprobs": np.linspace(-3.0, 0.0, 7, dtype=np.float32),
    "routed_experts": np.arange(42, dtype=np.int32).reshape(7, 3, 2)[:, ::-1],
    "loss_mask": np.array([True, False] * 3 + [True]),
    "empty": np.zeros((0, 4), dtype=np.float32),
}
HEADER = {"sampling": {"temperature": 0.7, "top_k": 0}, "config_hash": "ab12", "random_states": [1, 2**63]}


def test_a_step_record_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "steps" / "000137.safetensors"
    write_step_record(path, STREAMS, HEADER)
    streams, header = read_step_record(path)
    assert header == {**HEADER, "schema_version": 1}
    assert set(streams) == set(STREAMS)
    for name, stream in STREAMS.items():
        np.testing.assert_array_equal(streams[name], stream)
        assert streams[name].dtype == stream.dtype
    np.testing.assert_array_equal(load_file(path)["routed_experts"], STREAMS["routed_experts"])  # any reader's


def test_a_step_record_that_is_broken_or_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "000001.safetensors"
    write_step_record(path, STREAMS, {})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RecordError, match="not a step record"):
        read_step_record(path)
    write_step_record(path, STREAMS, {})
    path.write_bytes(path.read_bytes().replace(b'"schema_version":"1"', b'"schema_version":"2"'))
    with pytest.raises(RecordError, match="schema version 2"):
        read_step_record(path)


def example() -> Trajectory:
    routes = Routes(bytes(range(24)), 3, 2, 2)
    spans = (
        TokenSpan((5, 6, 7), "context", routed_experts=routes),
        TokenSpan((8, 9), "policy", (-0.1, -2.5), 4, SamplingSettings(0.7, 0.9, 5)),
        TokenSpan((3,), "demonstration"),
    )
    turn = Turn(
        (Message("assistant", '{"a": 1}', channel="commentary", recipient="functions.f", content_type="json"),),
        "the reply \u2028 ü",
        "stop",
        1,
        1,
        observation=(Message("tool", "2", name="functions.f"),),
        generate_s=0.25,
        env_s=0.5,
    )
    return Trajectory(
        Task("t", {"question": "?", "deep": [1, {"a": None}]}),
        "000137.004",
        2,
        (Message("user", "?"),),
        (turn, Turn((), "", "length", 1, 1, "cut off", dropped=("analysis of turn 1", "two messages"))),
        (Segment(spans), Segment(spans[:1])),
        "env_timeout",
        0.125,
        {"answer": 0.125},
        None,
        "step(): no answer",
        {"calls": 2.0},
    )


def test_trajectories_come_back(tmp_path: Path) -> None:
    path = tmp_path / "trajectories" / "000137.jsonl"
    write_trajectories(path, [example(), example()], with_tokens=True)
    assert read_trajectories(path) == [example(), example()]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert [row["schema_version"] for row in rows] == [1, 1]
    assert (rows[0]["num_tokens"], rows[0]["num_policy_tokens"]) == (9, 2)


def test_without_tokens_only_the_segments_are_missing() -> None:
    value = json.loads(json.dumps(trajectory_to_json(example())))
    assert "segments" not in value
    found = trajectory_from_json(value)
    assert found.segments == ()
    assert (found.turns, found.task, found.status, found.metrics) == (
        example().turns,
        example().task,
        example().status,
        example().metrics,
    )


@given(st.lists(st.floats(-50, 0), min_size=1, max_size=5), st.text(max_size=20))
def test_log_probs_and_texts_survive_to_the_bit(logprobs: list[float], text: str) -> None:
    span = TokenSpan(tuple(range(len(logprobs))), "policy", tuple(logprobs), 0, SamplingSettings())
    trajectory = Trajectory(Task("t"), "g", 0, (Message("user", text),), (), (Segment((span,)),), "completed")
    assert trajectory_from_json(json.loads(json.dumps(trajectory_to_json(trajectory, with_tokens=True)))) == trajectory


@pytest.mark.parametrize("line", ["{", "3", '{"schema_version": 1}'])
def test_a_line_that_is_no_trajectory_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "000001.jsonl"
    write_trajectories(path, [example()])
    path.write_text(path.read_text(encoding="utf-8") + line, encoding="utf-8")
    with pytest.raises(RecordError, match="line 2"):
        read_trajectories(path)


def test_a_trajectory_of_another_version_is_refused() -> None:
    with pytest.raises(RecordError, match="schema version 2"):
        trajectory_from_json({**trajectory_to_json(example()), "schema_version": 2})


def test_routes_that_spell_a_key_by_chance_come_back(tmp_path: Path) -> None:
    data = base64.b64decode("AIza" + "A" * 36)
    span = TokenSpan((1, 2, 3, 4, 5), "context", routed_experts=Routes(data, 5, 3, 1))
    trajectory = dataclasses.replace(example(), segments=(Segment((span,)),))
    path = tmp_path / "trajectories.jsonl"
    write_trajectories(path, [trajectory], with_tokens=True)
    (read,) = read_trajectories(path)
    assert read.segments == trajectory.segments
