"""Runs that are torn, half gone or made up: a report of what is left, and a word about what is not."""

from __future__ import annotations

import copy
import json
import random
import shutil

import numpy as np
import pytest

from keel.report.data import report_data
from keel.report.plain import to_json
from keel.rollouts.store import read_step_record, write_step_record


@pytest.fixture
def run(named_run, tmp_path):
    shutil.copytree(named_run("small"), tmp_path / "run")
    return tmp_path / "run"


def told(data):
    return " ".join(data["verdict"]["notes"])


@pytest.mark.parametrize(
    ("name", "content", "still"),
    [
        ("status.json", b"{", "unknown"),
        ("status.json", b'{"schema_version": 99}', "unknown"),
        ("config.toml", b"steps = = 3", "completed"),
        ("config.toml", b"\xff\xfe", "completed"),
        ("environment.json", b"[]", "completed"),
        ("metrics.jsonl", b"\x00\xff\n", "completed"),
    ],
)
def test_a_broken_file_costs_what_was_in_it_and_is_told_of(run, name, content, still):
    (run / name).write_bytes(content)
    data = report_data(run)
    assert data["run"]["state"] == still
    assert name in told(data)
    assert data["steps"] or name == "steps"


@pytest.mark.parametrize(
    "name", ["status.json", "environment.json", "metrics.jsonl", "summary.json", "steps", "trajectories", "model"]
)
def test_what_is_missing_is_no_fault(run, name):
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    data = report_data(run)
    assert to_json(data)
    if name == "model":
        tokens = next(
            each["tokens"] for group in data["steps"]["0"]["groups"] for each in group["trajectories"] if each["tokens"]
        )
        assert (tokens["text"], tokens["bytes"]) == (None, None)
    if name == "steps":
        notes = {each["tokens_note"] for group in data["steps"]["0"]["groups"] for each in group["trajectories"]}
        assert "No token streams were recorded for this attempt, or they cannot be read." in notes
    if name == "trajectories":
        assert data["sampling"] == "None of the 4 recorded steps can be read, so there are no episodes to show."


def bend_record(run, **changes):
    path = run / "steps" / "000002.safetensors"
    streams, _ = read_step_record(path)
    path.unlink()
    kept = {name: value for name, value in {**streams, **changes}.items() if value is not None}
    write_step_record(path, kept, {"step": 2})


@pytest.mark.parametrize(
    "change",
    [
        {"labels": None},
        {"rewards": None},
        {"turn": np.zeros(3, dtype=np.int32)},
        {"logprobs": np.zeros((2, 2), dtype=np.float32)},
        {"policy_version": np.zeros(5, dtype=np.float32)},
        {"cu_seqlens": np.array([0, 10**6])},
        {"cu_seqlens": np.array([5, 3, 1])},
        {"sequence_to_trajectory": np.array([77] * 8)},
        {"sequence_to_trajectory": np.array([0])},
    ],
)
def test_a_record_that_does_not_fit_itself_is_left_out_and_told_of(run, change):
    bend_record(run, **change)
    data = report_data(run)
    assert "record of step 2" in told(data) or "000002.safetensors: not a step record" in told(data)
    assert all(each["tokens"] is None for group in data["steps"]["2"]["groups"] for each in group["trajectories"])
    assert any(each["tokens"] for group in data["steps"]["1"]["groups"] for each in group["trajectories"])


def test_a_batch_that_holds_a_failed_world_breaks_the_invariant_and_has_no_tokens_to_trust(named_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(named_run("small"), run)
    file = run / "trajectories" / "000002.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["status"] = "env_error"
    file.unlink()
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    strip = {entry["name"]: entry for entry in report_data(run)["invariants"]}
    assert (strip["baseline"]["held"], strip["baseline"]["of"], strip["baseline"]["ok"]) == (3, 4, False)


def test_values_of_any_type_anywhere_break_nothing(named_run, tmp_path):
    """Each JSON value of rows, status and trajectories in turn, at random, replaced by something it should not be."""
    draw = random.Random(5)
    strange = [None, True, "x", -1, 1e308, 10**30, [], {}, [1], {"a": []}, "\ud800", ""]
    for attempt in range(25):
        run = tmp_path / f"run{attempt}"
        shutil.copytree(named_run("small"), run)
        for name in ("status.json", "environment.json", "metrics.jsonl", "trajectories/000003.jsonl", "summary.json"):
            file = run / name
            values = (
                [json.loads(line) for line in file.read_text().splitlines()]
                if name.endswith("l")
                else [json.loads(file.read_text())]
            )
            for value in values:
                places = [place for place in _places(value) if place != ("schema_version",)]
                for place in draw.sample(places, min(len(places), 1 + len(places) // 12)):
                    _put(value, place, copy.deepcopy(draw.choice(strange)))
            file.unlink()
            file.write_text("".join(json.dumps(value) + "\n" for value in values))
        data = report_data(run)
        assert json.loads(to_json(data)) == data


def _places(value, before=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*before, key)
        yield from _places(inner, (*before, key))


def _put(value, place, new):
    for key in place[:-1]:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return  # replaced before
    if isinstance(value, dict) or (isinstance(value, list) and isinstance(place[-1], int) and place[-1] < len(value)):
        value[place[-1]] = new
