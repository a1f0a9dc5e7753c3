"""The loop's own arithmetic: one row of several updates, and when things are due."""

from __future__ import annotations

import pytest

from keel.learner.base import Update
from keel.train import due, mean_metrics


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
