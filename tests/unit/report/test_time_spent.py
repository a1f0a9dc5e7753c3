from __future__ import annotations

import pytest

from keel.report.time_spent import time_spent


def step(unix_s, *, wait=1.0, learn=2.0, total=3.5):
    return {
        "kind": "step",
        "unix_s": unix_s,
        "time/rollout_wait_s": wait,
        "time/learn_s": learn,
        "time/publish_s": 0.0,
        "time/step_s": total,
    }


def spent(rows):
    return {entry["phase"]: entry["seconds"] for entry in time_spent(rows)}


def test_phases_evaluations_and_the_rest_add_up_to_the_runs_time():
    rows = [step(1000.0), step(1004.0), {"kind": "eval", "unix_s": 1009.0}, step(1013.5)]
    found = spent(rows)
    assert found["waiting for episodes"] == pytest.approx(3.0)
    assert found["learning"] == pytest.approx(6.0)
    assert found["evaluation"] == pytest.approx(5.0)
    assert found["checkpoints, records, other"] == pytest.approx(0.5 + 1.0 + 3 * 0.5)
    assert "publishing weights" not in found
    assert sum(found.values()) == pytest.approx(1013.5 - 1000.0 + 3.5)


def test_the_night_between_a_crash_and_its_resumption_is_not_counted():
    rows = [step(1000.0 + 4 * index) for index in range(20)] + [step(40_000.0 + 4 * index) for index in range(20)]
    assert sum(spent(rows).values()) == pytest.approx(39 * 4 - 4 + 2 * 3.5, abs=0.1)


def test_damaged_times_are_left_out():
    assert spent([{"kind": "step", "unix_s": "noon"}, {"kind": "step"}, step(float("inf")), {"kind": "alarm"}]) == {}
