"""What is not finite never reaches the weights, and does not go on for ever."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from keel.monitor import Monitor


@dataclass
class Update:
    loss: float
    grad_norm: float


FINE = Update(0.3, 1.0)
BROKEN = [Update(math.nan, 1.0), Update(0.3, math.inf), Update(-math.inf, math.nan)]


def test_a_finite_update_goes():
    verdict = Monitor(3).judge(FINE)
    assert (verdict.action, verdict.reason) == ("go", "")


@pytest.mark.parametrize("update", BROKEN)
def test_a_broken_update_is_skipped_with_its_reason(update):
    monitor = Monitor(3)
    verdict = monitor.judge(update)
    assert verdict.action == "skip"
    assert not verdict.goes
    assert not verdict.stops
    assert ("loss is" in verdict.reason) == (not math.isfinite(update.loss))
    assert ("gradient norm is" in verdict.reason) == (not math.isfinite(update.grad_norm))
    assert monitor.skips == 1


def test_skips_in_a_row_stop_the_run():
    monitor = Monitor(3)
    assert [monitor.judge(update).action for update in BROKEN] == ["skip", "skip", "stop"]


def test_a_good_update_between_starts_the_count_again():
    monitor = Monitor(2)
    actions = [monitor.judge(update).action for update in (BROKEN[0], FINE, BROKEN[1], FINE, BROKEN[2], BROKEN[0])]
    assert actions == ["skip", "go", "skip", "go", "skip", "stop"]
    assert monitor.skips == 4


def test_a_resumed_monitor_judges_as_the_undisturbed_one():
    first = Monitor(2)
    first.judge(BROKEN[0])
    second = Monitor(2)
    second.restore(first.state())
    assert second.judge(BROKEN[1]).stops
    assert second.state() == {"skips_in_a_row": 2, "skips": 2}


def test_the_limit_is_at_least_one():
    with pytest.raises(ValueError, match="max_skips"):
        Monitor(0)
