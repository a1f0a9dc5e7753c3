"""Corrections, reductions and advantages over a packed batch."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from keel.algo import advantage
from keel.algo.apply import add_advantages, correct, correction_inputs
from keel.algo.correction import none, token_truncated
from keel.algo.correction.base import Correction, CorrectionInputs, is_token_local
from keel.algo.reduce import masked_max, masked_sum, reduce_loss
from keel.batch import pack
from keel.types import Group


def scored(batch, shift):
    """The batch as if the learner found every drawn token `shift` more likely than the engine did."""
    return batch.with_micro_batches(
        dataclasses.replace(m, old_logprobs=m.rollout_logprobs + shift) for m in batch.micro_batches
    )


def test_token_truncated_by_hand():
    old = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    rollout = torch.tensor([-1.5, -3.0, -0.5], dtype=torch.float64)
    result = token_truncated(CorrectionInputs(old, rollout, torch.ones(3, dtype=torch.bool)), cap=2.0)
    assert result.weights.tolist() == pytest.approx([math.exp(0.5), 2.0, math.exp(-0.5)], abs=1e-15)
    assert result.metrics["truncated_share"].tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="cap=0"):
        token_truncated(CorrectionInputs(old, rollout, torch.ones(3, dtype=torch.bool)), cap=0)


def test_correct_fills_weights_and_says_how_many_were_cut(make_groups):
    batch = scored(pack(make_groups(), max_tokens=120), math.log(3.0))
    corrected = correct(batch, [(token_truncated, {"cap": 2.5})])
    for m in corrected.micro_batches:
        drawn = m.policy_version >= 0
        assert m.importance_weights[drawn].tolist() == [2.5] * int(drawn.sum())
        assert m.importance_weights[~drawn].tolist() == [1.0] * int((~drawn).sum())
    assert corrected.metrics["correction/truncated_share"] == pytest.approx(1.0)
    assert corrected.metrics["correction/weight_mean"] == pytest.approx(2.5)
    assert all(m.importance_weights is None for m in correct(batch, [(none, {})]).micro_batches)


def test_an_unscored_batch_waits_for_the_loss_or_is_refused(make_groups):
    batch = pack(make_groups(), max_tokens=120)
    assert is_token_local(token_truncated)
    assert correct(batch, [(token_truncated, {})]) is batch

    def whole_batch(inputs):
        return Correction()

    assert not is_token_local(whole_batch)
    with pytest.raises(ValueError, match="score"):
        correct(batch, [(whole_batch, {})])
    with pytest.raises(ValueError, match="old_logprobs"):
        correction_inputs(batch.micro_batches[0])
    assert correct(pack([], max_tokens=9), [(whole_batch, {})]).is_empty


def test_advantages_reach_the_tokens_of_their_trajectory_only(make_groups):
    groups = make_groups(5, 4, seed=3)
    batch = add_advantages(pack(groups, max_tokens=120), advantage.leave_one_out, {})
    expected = [
        value
        for group in groups
        for value in advantage.leave_one_out(torch.tensor([t.reward for t in group.trajectories])).tolist()
    ]
    for m in batch.micro_batches:
        for row, trajectory in enumerate(m.row_to_trajectory.tolist()):
            wanted = expected[trajectory] if m.loss_mask[row] else 0.0
            assert m.advantages[row].item() == wanted


def test_share_of_groups_without_a_signal(make_groups):
    alike, mixed = (
        [dataclasses.replace(t, reward=reward) for t, reward in zip(g.trajectories, rewards, strict=True)]
        for g, rewards in zip(make_groups(2, 3), ([0.1, 0.1, 0.1], [0.0, 1.0, 0.0]), strict=True)
    )
    groups = [
        Group("group 0", alike[0].task, tuple(alike)),
        Group("group 1", mixed[0].task, tuple(mixed)),
        Group("none", mixed[0].task, tuple(dataclasses.replace(t, status="env_error") for t in mixed)),
    ]
    batch = add_advantages(pack(groups, max_tokens=500), advantage.group_mean_std, {"eps": 1e-6})
    assert batch.metrics == {"advantage/groups": 2.0, "advantage/zero_share": 0.5}


@pytest.mark.parametrize("wrong", [lambda r: r[:1], lambda r: r / 0])
def test_an_advantage_that_is_no_advantage_is_refused(make_groups, wrong):
    with pytest.raises(ValueError, match="one finite number each"):
        add_advantages(pack(make_groups(), max_tokens=120), wrong, {})


def test_reductions_by_hand():
    values = torch.tensor([1.0, math.inf, 3.0, 4.0], requires_grad=True)
    mask = torch.tensor([True, False, True, False])
    weights = torch.tensor([2.0, 1.0, 0.5, 1.0])
    assert masked_sum(values, mask).item() == 4.0
    assert masked_sum(values, mask, weights).item() == 3.5
    loss = reduce_loss(values, mask, 8.0, weights)
    loss.backward()
    assert loss.item() == 3.5 / 8
    assert values.grad.tolist() == [0.25, 0.0, 0.0625, 0.0]
    assert masked_max(values.detach(), mask).item() == 3.0
    assert masked_max(torch.tensor([0.5, math.nan]), torch.tensor([True, True])).item() == math.inf
    assert masked_max(torch.tensor([0.5, math.nan]), torch.tensor([True, False])).item() == 0.5
    with pytest.raises(ValueError, match="denominator"):
        reduce_loss(values, mask, 0.0)


def test_sums_of_many_small_values_do_not_lose_them():
    """A float32 running sum of 20 million ones over 16.7 million stands still; the loss must not depend on that."""
    values = torch.tensor([2.0**24, 1.0, 1.0, 1.0])
    assert masked_sum(values, torch.ones(4, dtype=torch.bool)).item() == 2**24 + 3
