"""Trackers get what the run logs; one that is missing is told before anything is written."""

from __future__ import annotations

import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keel.config import TrainConfig
from keel.monitor import RunLog, trackers


def config_for(tmp_path):
    values = {"run_dir": str(tmp_path / "run"), "log": {"live": "off", "trackers": ("tensorboard",)}}
    return TrainConfig.model_validate(values)


def test_tensorboard_reads_back_what_a_killed_and_resumed_run_logged(tmp_path):
    run = RunLog.open(config_for(tmp_path))
    run.log_step(0, {"policy/loss": 9.0}, stage="warm_start")
    run.log_eval("after_warm_start", {"success": 0.5}, step=1)
    run.log_step(0, {"reward/mean": 0.25, "policy/loss": math.nan})
    state = run.state()
    run._trackers[0].close()
    run._held.close()
    with RunLog.resume(tmp_path / "run") as resumed:
        resumed.restore(state)
        resumed.log_step(1, {"reward/mean": 0.75})
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "tensorboard"))
    events.Reload()
    points = {
        tag: [(e.step, float(e.tensor_proto.float_val[0])) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    assert points == {
        "warm_start/policy/loss": [(1, 9.0)],  # training steps finished, over all stages
        "eval/success": [(1, 0.5)],
        "reward/mean": [(2, 0.25), (3, 0.75)],
    }


def test_a_missing_tracker_is_told_before_a_run_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(trackers.TrackerError, match=r"pip install 'keel-rl\[tensorboard\]'"):
        RunLog.open(config_for(tmp_path))
    assert not (tmp_path / "run").exists()


def test_points_that_cannot_be_drawn_are_left_out():
    assert trackers.numbers({"a": 1, "b": None, "c": math.inf, "d": math.nan, "e": 0.5}) == {"a": 1.0, "e": 0.5}
