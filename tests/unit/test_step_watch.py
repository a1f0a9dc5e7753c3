"""A step's parts are timed once each, whatever the order of their phases, and whoever watches knows the phase."""

from __future__ import annotations

import time

import pytest
import torch

from keel.device import MemoryWatch
from keel.monitor.progress import Progress
from keel.step_watch import StepWatch


def busy(seconds: float) -> None:
    """Take at least that long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_parts_of_a_step_add_up_and_progress_knows_the_phase():
    progress = Progress()
    watch = StepWatch(progress, MemoryWatch(torch.device("cpu"), 2**20))
    seen = []
    for phase in ("collect", "pack", "score", "backward", "optimizer", "backward", "optimizer", "publish", "record"):
        watch.enter(phase, **({"tokens": 7} if phase == "score" else {}))
        busy(0.01)
        seen.append((progress.phase, dict(progress.sizes)))
    told = watch.figures()
    assert told.keys() == {
        *("time/score_s", "time/update_s", "time/learn_s", "time/publish_s", "time/step_s"),
        *("memory/key_values_mib", "memory/resident_mib"),
    }
    assert told["time/learn_s"] >= 6 * 0.01
    assert told["time/score_s"] >= 2 * 0.01
    assert told["time/update_s"] >= 4 * 0.01
    assert told["time/score_s"] + told["time/update_s"] == pytest.approx(told["time/learn_s"])
    assert 0.01 <= told["time/publish_s"] < told["time/step_s"]
    assert told["time/step_s"] >= told["time/learn_s"] + told["time/publish_s"] + 2 * 0.01  # collecting, recording
    assert [phase for phase, _ in seen][:4] == ["collect", "pack", "score", "backward"]
    assert [sizes for _, sizes in seen] == [{}, {}] + [{"tokens": 7}] * 7
    assert progress.moves == 9
