"""A run says so itself when engine and learner part."""

from __future__ import annotations

import json
import math

from keel.config import TrainConfig
from keel.monitor.apart import EngineApart
from keel.monitor.bands import MISMATCH, bands
from keel.monitor.rules import REPEAT_AFTER

BAND = bands(TrainConfig.model_validate({"model": {"dtype": "float32"}}))[MISMATCH]


def told(rule: EngineApart, gaps: list[float], *, first: int = 0, **others: float) -> list[tuple[int, int]]:
    """(step, first bad step) of each alarm."""
    found = []
    for step, gap in enumerate(gaps, start=first):
        alarm = rule.watch("reinforcement", step, {MISMATCH: gap, **others})
        if alarm is not None:
            found.append((step, alarm.first_step))
            assert f"{gap:.2g} nats" in alarm.text
            assert "keel preflight" in alarm.text
    return found


def test_rounding_is_silent_and_a_gap_is_told_at_once() -> None:
    assert told(EngineApart(BAND), [2e-7, 9e-6, 1e-5]) == []
    assert told(EngineApart(BAND), [2e-7, 2e-7, 1.1e-5, 0.3, 0.3]) == [(2, 2)]
    assert told(EngineApart(BAND), [math.nan]) == [(0, 0)]


def test_it_is_told_again_with_the_step_it_began_and_anew_after_it_was_gone() -> None:
    assert told(EngineApart(BAND), [0.1] * (REPEAT_AFTER + 1)) == [(0, 0), (REPEAT_AFTER, 0)]
    assert told(EngineApart(BAND), [0.1, 1e-7, 0.1]) == [(0, 0), (2, 2)]


def test_tokens_of_an_older_policy_and_of_demonstrations_are_no_measure() -> None:
    assert told(EngineApart(BAND), [0.1] * 3, **{"policy/staleness": 1.0}) == []
    assert EngineApart(BAND).watch("warm_start", 0, {MISMATCH: 0.1}) is None
    assert EngineApart(BAND).watch("reinforcement", 0, {}) is None


def test_a_resumed_run_warns_as_the_undisturbed_one() -> None:
    gaps = [0.1] * (REPEAT_AFTER + 3)
    rule = EngineApart(BAND)
    first = told(rule, gaps[:5])
    resumed = EngineApart(BAND)
    resumed.restore(json.loads(json.dumps(rule.state())))
    assert first + told(resumed, gaps[5:], first=5) == told(EngineApart(BAND), gaps)
