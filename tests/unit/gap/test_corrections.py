"""What a correction would have done, against the same by hand."""

from __future__ import annotations

import numpy as np
import pytest

from keel.gap.corrections import TRIED, correction_effects

ROLLOUT = np.array([-1.0, -1.0, -1.0, -12.0, -1.0])
LEARNER = ROLLOUT + np.log([1.0, 4.0, 0.25, 10.0, 1.0])  # so these are the ratios
OWNER = np.array([0, 0, 1, 1, 2])


@pytest.fixture(scope="module")
def effects():
    return {each.label: each for each in correction_effects(ROLLOUT, LEARNER, OWNER)}


def ess(*weights):
    w = np.array(weights)
    return w.sum() ** 2 / (len(w) * (w**2).sum())


def test_every_one_that_is_tried_is_there(effects):
    assert list(effects) == [label for _, label, _ in TRIED]
    assert [each.ess_before for each in effects.values()] == [pytest.approx(ess(1, 4, 0.25, 10, 1))] * len(TRIED)


def test_without_correction_every_token_counts_alike(effects):
    none = effects["no correction"]
    assert (none.masked, none.truncated, none.trajectories_lost, none.weight_mean, none.ess) == (0, 0, 0, 1, 1)


def test_truncated_per_token(effects):
    found = effects["token TIS, cap 2"]
    assert found.truncated == pytest.approx(2 / 5)
    assert found.weight_mean == pytest.approx((1 + 2 + 0.25 + 2 + 1) / 5)
    assert found.ess == pytest.approx(ess(1, 2, 0.25, 2, 1))
    assert found.masked == 0


def test_truncated_per_trajectory(effects):
    """Products 4, 2.5 and 1."""
    found = effects["sequence TIS, cap 2"]
    assert found.truncated == pytest.approx(4 / 5)
    assert found.ess == pytest.approx(ess(2, 2, 2, 2, 1))


def test_masked_tokens_leave(effects):
    found = effects["token masked (IcePop), 0.5 to 5"]
    assert found.masked == pytest.approx(2 / 5)
    assert found.trajectories_lost == pytest.approx(1 / 3)  # both of the second one's
    assert found.weight_mean == pytest.approx((1 + 4 + 1) / 3)
    assert found.ess == pytest.approx(ess(1, 4, 1))


def test_rejected_trajectories_leave_whole(effects):
    assert effects["sequence masked, 0.5 to 2"].masked == pytest.approx(4 / 5)
    geometric = effects["geometric rejection, 0.99 to 1.01"]
    assert (geometric.masked, geometric.weight_mean, geometric.ess) == (pytest.approx(4 / 5), 1, 1)
    assert geometric.trajectories_lost == pytest.approx(2 / 3)
    assert effects["veto trajectories, r below 0.0001"].masked == 0


def test_where_nothing_is_left_there_is_no_weight():
    far = np.array([-20.0, -20.0])
    found = {each.label: each for each in correction_effects(np.array([-1.0, -1.0]), far, np.array([0, 0]))}
    vetoed = found["veto trajectories, r below 0.0001"]
    assert (vetoed.masked, vetoed.trajectories_lost, vetoed.weight_mean, vetoed.ess) == (1, 1, 0, 0)


def test_no_tokens_no_effects():
    assert correction_effects(np.zeros(0), np.zeros(0), np.zeros(0)) == ()
