"""Advantages against formulas worked out by hand, and their exact zeros."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keel import plugins
from keel.algo import advantage

ALL = [getattr(advantage, name) for name in advantage.__all__]
REWARDS = torch.tensor([1.0, 0.0, 0.0, 3.0], dtype=torch.float64)  # mean 1, sum of squared deviations 6


def test_group_mean_by_hand():
    assert advantage.group_mean(REWARDS).tolist() == [0.0, -1.0, -1.0, 2.0]


def test_group_mean_std_by_hand():
    std = math.sqrt(6 / 3)
    expected = torch.tensor([0.0, -1.0, -1.0, 2.0], dtype=torch.float64) / (std + 1e-6)
    torch.testing.assert_close(advantage.group_mean_std(REWARDS), expected, rtol=1e-15, atol=0)
    wide = advantage.group_mean_std(REWARDS, eps=1.0)
    torch.testing.assert_close(wide, expected * (std + 1e-6) / (std + 1.0), rtol=1e-15, atol=0)


def test_leave_one_out_by_hand():
    others = torch.tensor([3 / 3, 4 / 3, 4 / 3, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(advantage.leave_one_out(REWARDS), REWARDS - others, rtol=1e-15, atol=0)
    torch.testing.assert_close(advantage.leave_one_out(REWARDS), advantage.group_mean(REWARDS) * 4 / 3)


@pytest.mark.parametrize("function", ALL)
@given(reward=st.floats(-1e6, 1e6, width=32), size=st.integers(1, 9))
def test_equal_rewards_give_exact_zeros(function, reward, size):
    """Also 0.1, whose float mean is not itself: no gradient may come from rounding."""
    assert function(torch.full((size,), reward)).tolist() == [0.0] * size


@pytest.mark.parametrize("function", ALL)
@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12))
def test_advantages_add_up_to_zero_and_keep_the_order(function, values):
    rewards = torch.tensor(values, dtype=torch.float64)
    advantages = function(rewards)
    assert abs(float(advantages.sum())) <= 1e-9 * (1 + float(advantages.abs().max()))
    order = rewards.argsort()
    assert bool((advantages[order].diff() >= 0).all())


@pytest.mark.parametrize("name", advantage.__all__)
def test_short_names_resolve(name):
    assert plugins.resolve(name, "keel.algo.advantage") is getattr(advantage, name)
