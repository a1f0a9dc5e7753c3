"""Trackers get what the run logs; one that is missing is told before anything is written."""

from __future__ import annotations

import importlib
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keel.config import TrainConfig
from keel.monitor import RunLog, trackers
from keel.monitor.rows import read_json


def config_for(tmp_path):
    values = {"run_dir": str(tmp_path / "run"), "log": {"live": "off", "trackers": ("tensorboard",)}}
    return TrainConfig.model_validate(values)


def test_tensorboard_reads_back_what_a_killed_and_resumed_run_logged(tmp_path):
    run = RunLog.open(config_for(tmp_path))
    run.log_step(0, {"policy/loss": 9.0}, stage="warm_start")
    run.log_eval("after_warm_start", {"success": 0.5}, step=1)
    run.log_step(0, {"reward/mean": 0.25, "policy/loss": math.nan})
    state = run.state()
    run._trackers.close()
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


class Broken:
    """A tracker whose service is away."""

    def log(self, step, metrics):
        raise ConnectionError("no route to host")

    def close(self):
        raise ConnectionError("no route to host")


def test_a_tracker_that_fails_ends_no_run_and_is_told_of_once(tmp_path, capsys):
    config = config_for(tmp_path)
    with RunLog.open(config) as run:
        run.add_tracker(Broken())
        for step in range(3):
            run.log_step(step, {"reward/mean": 0.5})
    assert read_json(run.paths.status)["state"] == "completed"
    assert capsys.readouterr().out.count("the tracker Broken failed, the run goes on: ConnectionError") == 1
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Tensors("reward/mean")] == [1, 2, 3]


def test_a_tracker_that_cannot_begin_lets_go_of_the_directory(tmp_path, monkeypatch):
    """In a notebook the process lives on, and so would the lock."""
    monkeypatch.setattr(importlib.import_module("tensorboard.summary"), "Writer", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        RunLog.open(config_for(tmp_path))
    assert caught.traceback  # which holds the run
    monkeypatch.undo()
    assert read_json(tmp_path / "run" / "status.json")["state"] == "failed"
    with RunLog.resume(tmp_path / "run") as run:
        run.restore(None)
        assert run.close().state == "completed"
