"""The interval against its definition: the rates whose z-score, given what was seen, is at most z."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel.monitor import success_metrics, wilson_interval
from keel.monitor.wilson import Z_95


@given(data=st.data(), trials=st.integers(1, 5000))
def test_the_bounds_solve_the_score_equation(data, trials):
    successes = data.draw(st.integers(0, trials))
    rate = successes / trials
    low, high = wilson_interval(successes, trials)
    assert 0.0 <= low <= rate <= high <= 1.0
    for bound in (low, high):
        if 0.0 < bound < 1.0:
            score = (rate - bound) / math.sqrt(bound * (1 - bound) / trials)
            assert abs(score) == pytest.approx(Z_95, rel=1e-6)


def test_a_published_value():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81 of 263 gives 0.2553 to 0.3662.
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_bounds_at_the_ends_are_exact():
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 4), (5, 4)])
def test_counts_that_cannot_be_are_refused(successes, trials):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, trials)


def test_what_an_evaluation_reports():
    assert success_metrics(461, 512) == {
        "success": 461 / 512,
        "success_low": wilson_interval(461, 512)[0],
        "success_high": wilson_interval(461, 512)[1],
        "num_tasks": 512,
    }
