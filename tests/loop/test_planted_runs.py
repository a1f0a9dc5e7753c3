"""Runs with faults planted on purpose: the gap is there, and the run says why in every row, in its notes and alarms."""

from __future__ import annotations

import json

import pytest

from keel.config import TrainConfig
from keel.distortion import Distortion
from keel.loop import train
from keel.models.policy import PolicyModel

SINKS = Distortion("sinks_dropped")
STALE = Distortion("stale_version", 1)


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("stage") == "reinforcement" and "policy/loss" in row]


@pytest.mark.parametrize(
    ("engine", "learner", "gap"),
    [
        ((SINKS,), (), (1e-3, 10)),
        ((), (SINKS,), (1e-3, 10)),
        ((SINKS,), (SINKS,), (0, 1e-5)),
    ],
    ids=["engine", "learner", "both"],
)
def test_a_run_with_faults_has_the_gap_and_says_why(tmp_path, make_config, capsys, engine, learner, gap):
    config: TrainConfig = make_config(
        tmp_path / "run",
        "gpt_oss",
        steps=1,
        engine={"distortions": engine},
        learner={"distortions": learner},
        sync={"check_every": 0},
    )
    train(config)
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 1
    low, high = gap
    assert all(low <= row["mismatch/abs_mean"] <= high for row in rows)
    assert all(row["policy/ratio_max_dev"] == 0 for row in rows)
    shown = capsys.readouterr()
    told = shown.out + shown.err
    assert all((row["faults/engine"], row["faults/learner"]) == (len(engine), len(learner)) for row in rows)
    assert "faults are planted on purpose" in told
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("rule") == "planted_faults"] == [0]
    plain = PolicyModel.load(tmp_path / "run" / "model").model.config
    saved = max((tmp_path / "run" / "checkpoints").glob("*/weights"))
    assert PolicyModel.load(saved).model.config.sliding_window == plain.sliding_window


def test_a_learner_that_is_a_version_behind_learns_with_weights_that_no_longer_act(tmp_path, make_config):
    config = make_config(
        tmp_path / "run",
        "qwen3",
        steps=1,
        warm_start={"steps": 2, "demonstrations_per_step": 4},
        learner={"distortions": (STALE,)},
        sync={"check_every": 0},
    )
    train(config)
    (row,) = rows_of(tmp_path / "run")
    assert row["mismatch/abs_mean"] > 1e-3
