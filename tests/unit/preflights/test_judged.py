"""What of a gap near-ties may excuse, and what not."""

from __future__ import annotations

import numpy as np
import pytest

from keel.preflights.gap import Noise, judged_mean

NOISE = 5e-7


def noise(near_ties: list[bool], excused_share: float = 0.1) -> Noise:
    near = np.array(near_ties)
    return Noise(NOISE, NOISE, near, "float64", np.zeros(len(near), np.float32), excused_share)


def test_a_few_outliers_after_a_near_tie_are_left_out():
    gap = np.full(20, NOISE)
    gap[3] = 2.0
    assert judged_mean(gap, noise([index == 3 for index in range(20)])) == (pytest.approx(NOISE), 1)


def test_an_outlier_that_no_near_tie_explains_counts():
    gap = np.full(20, NOISE)
    gap[3] = 2.0
    assert judged_mean(gap, noise([False] * 20))[0] > 0.09


def test_near_ties_everywhere_excuse_nothing():
    """With many layers and experts every token lies behind a near-tie: a wrong stack must not pass for that."""
    gap = np.array([2.0, 1.0, 2.0])
    assert judged_mean(gap, noise([True] * 3)) == (pytest.approx(5 / 3), 0)
    mostly = np.full(40, NOISE)
    mostly[:6] = 1.0
    assert judged_mean(mostly, noise([True] * 40))[0] > 0.1
    assert judged_mean(mostly, noise([True] * 40, excused_share=0.2)) == (pytest.approx(NOISE), 6)
