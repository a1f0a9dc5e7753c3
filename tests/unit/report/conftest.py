"""Synthetic runs, written once a session, and rows to put findings into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.report_runs import write_named

Row = dict[str, Any]


@pytest.fixture(scope="session")
def named_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`named_run("crashed")`: the directory of a run of `report_runs.PLANS`; tests must leave it as it is."""
    root = tmp_path_factory.mktemp("runs")
    made: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in made:
            made[name] = write_named(root, name)
        return made[name]

    return write


@pytest.fixture
def make_rows() -> Callable[..., list[Row]]:
    """`make_rows(40, **{"reward/mean": f})`: sound rows; a metric is a value or a function of the step."""

    def make(count: int, **metrics: Any) -> list[Row]:
        healthy: Row = {
            "reward/mean": lambda step: 0.3 + 0.5 * step / max(1, count),
            "policy/entropy": 0.5,
            "policy/ratio_max_dev": 0.0,
            "policy/recompute_max_dev": 0.0,
            "policy/grad_norm": 0.2,
            "policy/loss": -0.1,
            "policy/skipped": 0.0,
            "mismatch/abs_mean": 2e-7,
            "rollout/episodes": 64.0,
            "rollout/failed": 0.0,
            "rollout/truncated": 0.0,
            "rollout/signal_share": 0.8,
            **metrics,
        }
        return [
            {
                "kind": "step",
                "stage": "reinforcement",
                "step": step,
                "train_step": step + 1,
                "not_finite": {},
                **{name: value(step) if callable(value) else value for name, value in healthy.items()},
            }
            for step in range(count)
        ]

    return make
