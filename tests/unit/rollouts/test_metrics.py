"""Names of columns: an environment's own names cannot stand in for the run's, nor be anything but names."""

from __future__ import annotations

import re

from keel.rollouts.metrics import column_name, outcome_metrics
from keel.types import Task, Trajectory
from tests.hostile import HOSTILE

SANE = re.compile(r"(env|reward)/[\w.+@%=:/~ -]{1,80}")


def test_ordinary_names_stay():
    for name in ("turns_used", "calls.calculator", "f1@k=2", "Treffer", "正解", "a b", "x/y"):
        assert column_name("env", name) == f"env/{name}"


def test_hostile_names_become_names_and_no_two_the_same():
    names = {column_name("reward", text) for text in HOSTILE.values()}
    assert len(names) == len(set(HOSTILE.values()))
    assert all(SANE.fullmatch(name) for name in names)


def test_a_part_cannot_pass_for_the_runs_own_reward():
    trajectory = Trajectory(Task("t", {}), "g", 0, (), (), (), "completed", 0.25, {"mean": 9.0}, metrics={"mean": 7.0})
    metrics = outcome_metrics([trajectory])
    assert metrics["reward/mean"] == 0.25
    assert metrics["env/mean"] == 7.0
    assert [value for name, value in metrics.items() if name.startswith("reward/mean~")] == [9.0]
