"""Whole runs: on every step of both stages the policy that learns is the policy that acted, to the bit."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from keel.loop import train

WHOLE, SINGLE = 100_000, 16


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "step"]


@pytest.mark.parametrize(
    ("preset", "dtype", "checkpointing", "max_tokens", "micro_batches"),
    [
        ("gpt_oss", "float32", False, SINGLE, {16}),
        ("gpt_oss", "bfloat16", True, 700, {3, 4, 5}),
        ("qwen3", "float32", True, 160, {3, 4, 5}),
        ("qwen3", "bfloat16", False, WHOLE, {1}),
        ("qwen3_moe", "float32", True, WHOLE, {1}),
        ("qwen3_moe", "bfloat16", False, SINGLE, {16}),
    ],
)
def test_every_step_is_on_policy(
    tmp_path, make_config, warm_weights, preset, dtype, checkpointing, max_tokens, micro_batches
):
    """2 x 8 episodes a step, in one micro-batch, in about four, or each in its own."""
    config = make_config(
        tmp_path / "run",
        model={"path": warm_weights(preset), "dtype": dtype, "gradient_checkpointing": checkpointing},
        steps=3,
        warm_start={"steps": 2, "optim": {"lr": 1e-3}},
        optim={"lr": 1e-3},
        batch={"max_tokens": max_tokens},
    )
    summary = train(config)
    assert (summary.state, summary.steps) == ("completed", 3)
    rows = rows_of(tmp_path / "run")
    assert [row["stage"] for row in rows] == ["warm_start"] * 2 + ["reinforcement"] * 3
    for row in rows:
        assert row["policy/ratio_max_dev"] == 0.0
        assert row["policy/recompute_max_dev"] == 0.0
        assert row["policy/clip_fraction"] == 0.0
        assert row["policy/staleness"] == 0.0
        assert row["policy/num_skipped"] == 0.0
    reinforced = rows[2:]
    assert max(row["policy/grad_norm"] for row in reinforced) > 0.0
    assert all(row["rollout/failed"] == 0 for row in reinforced)
    assert max(row["rollout/turns"] for row in reinforced) > 1.2  # calls were made, and answered
    if dtype == "float32":
        assert statistics.median(row["mismatch/abs_mean"] for row in reinforced) <= 1e-6
        assert all(row["mismatch/outliers"] == row.get("mismatch/outliers_routed", 0.0) for row in reinforced)
    records = [load_file(path) for path in sorted((tmp_path / "run" / "steps").glob("*.safetensors"))]
    assert {len(record["micro_batch_bounds"]) - 1 for record in records} <= micro_batches


def test_qwen_calls_are_in_hermes_style(warm_run):
    """The calculator's episodes work over a chat template: calls are read, answered, and the answer is used."""
    texts = [path.read_text() for path in sorted((warm_run("qwen3") / "trajectories").glob("*.jsonl"))]
    episodes = [json.loads(line) for text in texts for line in text.splitlines()]
    called = [episode for episode in episodes if len(episode["turns"]) == 2]
    assert called
    for episode in called:
        first, last = episode["turns"]
        assert "<tool_call>" in first["reply_text"]
        assert first["observation"][0]["role"] == "tool"
        assert last["malformed"] or "<tool_call>" not in last["reply_text"]
