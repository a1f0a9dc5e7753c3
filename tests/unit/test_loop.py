"""The loop's own arithmetic: one row of several updates, and when things are due."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from keel.batch import PackedBatch
from keel.build import with_absolute_model
from keel.config import TrainConfig
from keel.learner.base import Update
from keel.loop import due, mean_metrics, take_updates
from keel.monitor.progress import Progress
from keel.monitor.rules import Monitor
from keel.types import Verdict


def update(num_loss_tokens: int, metrics: dict[str, float]) -> Update:
    return Update(1, 0, False, 0.0, 0.0, True, num_loss_tokens, metrics)


def test_a_row_of_several_updates():
    """Means are over tokens, maxima the worst, counts summed, and what only some updates have is theirs."""
    first = {"policy/loss": 1.0, "policy/ratio_max_dev": 0.0, "mismatch/abs_max": 0.5, "policy/kl": 3.0}
    first |= {"policy/staleness": 0.0, "mismatch/outliers": 2.0, "policy/loss_tokens": 100.0}
    second = {"policy/loss": 2.0, "policy/ratio_max_dev": 0.25, "mismatch/abs_max": 0.1}
    second |= {"policy/staleness": 1.0, "mismatch/outliers": 3.0, "policy/loss_tokens": 300.0}
    assert mean_metrics([update(100, first), update(300, second)]) == {
        "policy/loss": pytest.approx(1.75),
        "policy/ratio_max_dev": 0.25,
        "mismatch/abs_max": 0.5,
        "policy/kl": 3.0,
        "policy/staleness": 1.0,
        "mismatch/outliers": 5.0,
        "policy/loss_tokens": 400.0,
    }


def test_updates_without_tokens_have_a_row_too():
    assert mean_metrics([update(0, {"policy/loss": 0.0}), update(0, {"policy/loss": 0.0})]) == {"policy/loss": 0.0}
    assert mean_metrics([update(0, {"policy/loss": 5.0}), update(10, {"policy/loss": 1.0})]) == {"policy/loss": 1.0}
    assert mean_metrics([]) == {}


def test_due():
    assert [done for done in range(1, 9) if due(done, 3)] == [3, 6]
    assert not any(due(done, 0) for done in range(9))


class Scripted:
    """A learner whose updates have the given losses; it keeps the verdicts it was given."""

    def __init__(self, *losses: float) -> None:
        self.losses = losses
        self.verdicts: list[Verdict] = []

    def backward(self, batch: Any, index: int) -> Update:
        loss = self.losses[index]
        return Update(index, index, index == len(self.losses) - 1, loss, 1.0, math.isfinite(loss), 10, {})

    def apply(self, update: Update, verdict: Verdict) -> dict[str, float]:
        self.verdicts.append(verdict)
        skipped = float(not verdict.goes)
        return {"policy/lr": 0.1, "policy/clip_factor": 1.0 - skipped, "policy/skipped": skipped}


def batch_of(num_updates: int) -> PackedBatch:
    bounds = tuple(range(num_updates + 1))
    nothing = torch.zeros(0)
    return PackedBatch((), bounds, (1.0,) * num_updates, nothing, nothing, 0, ())


@pytest.mark.parametrize(
    ("losses", "given", "worst"),
    [
        ([1.0, 1.0], ["go", "go"], "go"),
        ([math.nan, 1.0], ["skip", "go"], "skip"),
        ([1.0, math.nan], ["go", "skip"], "skip"),
        ([math.nan, math.nan, 1.0, 1.0], ["skip", "stop", "skip", "skip"], "stop"),
    ],
)
def test_the_worst_verdict_of_a_batch_stands(losses, given, worst):
    """No later update hides a skip or undoes a stop, and what a checkpoint keeps of the monitor knows the stop."""
    learner, monitor = Scripted(*losses), Monitor(max_skips=2)
    updates, stats, verdict = take_updates(learner, monitor, batch_of(len(losses)), Progress())
    assert [each.action for each in learner.verdicts] == given
    assert verdict.action == worst
    assert len(updates) == len(losses)
    assert stats["policy/skipped"] == sum(action != "go" for action in given)
    assert stats["policy/clip_factor"] == float(worst == "go")
    resumed = Monitor(max_skips=2)
    resumed.restore(monitor.state())
    assert resumed.standing().stops == (worst == "stop")


def test_a_models_directory_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    monkeypatch.chdir(tmp_path)
    near = with_absolute_model(TrainConfig.model_validate({"model": {"path": "weights"}}))
    assert near.model.path == str(tmp_path / "weights")
    hub = TrainConfig.model_validate({"model": {"path": "openai/gpt-oss-20b"}})
    assert with_absolute_model(hub) is hub
