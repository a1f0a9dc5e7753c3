"""Modes are values: other algorithms, several updates a batch and rollouts ahead of the learner, by the same loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from keel.loop import train


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "step"]


@pytest.mark.parametrize("updates", [1, 2])
def test_everything_an_algorithm_may_have(tmp_path, make_config, warm_weights, updates):
    """KL to the starting weights, entropy bonus, truncated weights, normalized advantages; scored or detached."""
    algo = {
        "advantage": {"id": "group_mean_std"},
        "loss": {"id": "ppo_clip", "clip_high": 0.28},
        "correction": {"id": "token_truncated", "cap": 2.0},
        "kl": {"coefficient": 0.1},
        "entropy_coefficient": 0.01,
        "updates_per_batch": updates,
    }
    train(make_config(tmp_path / "run", model={"path": warm_weights("gpt_oss")}, algo=algo, steps=3))
    rows = steps_of(tmp_path / "run")
    assert [row["policy/staleness"] for row in rows] == [updates - 1.0] * 3  # of the oldest token, at the last update
    assert (rows[0]["policy/kl"] == 0.0) == (updates == 1)  # the reference is the stage's first weights
    assert all(row["policy/kl"] > 0.0 for row in rows[1:])
    assert all(row["correction/truncated_share"] == 0.0 for row in rows)  # the engine's log-probs are the learner's
    for row in rows:
        assert (row["policy/ratio_max_dev"] > 0.0) == (updates > 1)
        assert row["policy/recompute_max_dev"] == 0.0


def test_rollouts_ahead_of_the_learner(tmp_path, make_config, warm_weights):
    """With an engine of its own, a step's episodes may begin before the last step is learned: at most one behind."""
    config = make_config(
        tmp_path / "run",
        model={"path": warm_weights("gpt_oss")},
        engine={"process": "separate"},
        rollout={"max_staleness": 1},
        algo={"correction": {"id": "token_truncated"}},
        steps=4,
    )
    assert train(config).state == "completed"
    rows = steps_of(tmp_path / "run")
    assert len(rows) == 4
    assert rows[0]["policy/staleness"] == 0.0
    assert all(row["policy/staleness"] <= 1.0 for row in rows)
    assert all(row["rollout/failed"] == 0.0 for row in rows)
