"""Corrections one by one and together: what they weigh, whom they leave out, and what they say of it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from keel.algo.advantage import group_mean
from keel.algo.apply import add_advantages, correct
from keel.algo.correction import (
    none,
    normalized,
    reject,
    sequence_masked,
    sequence_truncated,
    token_masked,
    token_truncated,
    veto,
)
from keel.algo.correction.base import CorrectionInputs, compose, is_token_local
from keel.batch import pack
from keel.config import AlgoConfig, Plugin
from keel.learner.gradient import Objective, bound_corrections
from keel.plugins import PluginError

# Three trajectories of 3, 2 and 4 rows; the first row of the first and the last of the last are context.
GAPS = [9.0, 0.1, -0.2, 0.5, 0.5, -0.1, 0.0, -12.0, 9.0]
MASK = [False, True, True, True, True, True, True, True, False]
WHOSE = [0, 0, 0, 1, 1, 2, 2, 2, 2]


def inputs(gaps=GAPS) -> CorrectionInputs:
    rollout = -torch.arange(1.0, len(gaps) + 1, dtype=torch.float64)
    return CorrectionInputs(rollout + torch.tensor(gaps), rollout, torch.tensor(MASK), torch.tensor(WHOSE))


def rows(stream: torch.Tensor) -> list[float]:
    """At loss tokens."""
    return stream[torch.tensor(MASK)].tolist()


def test_a_trajectorys_tokens_share_one_weight():
    product = rows(sequence_truncated(inputs(), cap=2.0).weights)
    assert product == pytest.approx([math.exp(-0.1)] * 2 + [2.0] * 2 + [math.exp(-12.1)] * 3)
    geometric = rows(sequence_truncated(inputs(), cap=1.5, average="geometric").weights)
    assert geometric == pytest.approx([math.exp(-0.05)] * 2 + [1.5] * 2 + [math.exp(-12.1 / 3)] * 3)


def test_context_has_no_say():
    """The wild gaps outside the loss mask change nothing anywhere."""
    calm = [gap if drawn else 0.0 for gap, drawn in zip(GAPS, MASK, strict=True)]
    for function in (sequence_truncated, sequence_masked, token_masked, reject, veto):
        options = {"high": 0.01} if function is reject else {}
        wild, tame = (function(inputs(gaps), **options) for gaps in (GAPS, calm))
        for field in ("weights", "keep"):
            one, other = getattr(wild, field), getattr(tame, field)
            assert (one is None) == (other is None)
            if one is not None:
                assert rows(one) == rows(other), function


def test_a_veto_takes_the_whole_trajectory():
    result = veto(inputs(), below=1e-4)
    assert rows(result.keep) == [True] * 4 + [False] * 3
    assert sum(rows(result.metrics["veto_tokens_share"])) == 1.0
    assert sum(rows(result.metrics["masked_share"])) == 3.0
    assert rows(veto(inputs(), below=0.0, above=1.6).keep) == [True] * 2 + [False] * 2 + [True] * 3


def test_the_sides_of_a_bound():
    result = token_masked(inputs(), low=0.5, high=1.2)
    assert sum(rows(result.metrics["below_share"])) == 1.0  # r = exp(-12)
    assert sum(rows(result.metrics["above_share"])) == 2.0  # r = exp(0.5), twice
    assert sum(rows(result.metrics["masked_share"])) == 3.0


def test_a_nan_is_never_kept():
    gaps = [*GAPS[:3], math.nan, *GAPS[4:]]
    for function, options in ((token_masked, {}), (reject, {"high": 1e9}), (sequence_masked, {"high": 1e9})):
        assert rows(function(inputs(gaps), **options).keep)[2] is False, function
    assert rows(veto(inputs(gaps), below=0.0).keep) == [True, True, False, False, True, True, True]


def test_rejections_add_up():
    result = compose([(veto, {}), (token_masked, {"low": 0.5, "high": 1.2})], inputs())
    assert rows(result.keep) == [True, True, False, False, False, False, False]
    assert sum(rows(result.metrics["masked_share"])) == 5.0
    # The vetoed token is no longer there to be below the second one's bound.
    assert sum(rows(result.metrics["below_share"])) == 0.0


def test_normalized_weights_average_one_over_what_is_left():
    result = compose([(veto, {}), (token_truncated, {"cap": 5.0}), (normalized, {})], inputs())
    left = result.keep & torch.tensor(MASK)
    assert result.weights[left].mean().item() == pytest.approx(1.0, abs=1e-12)
    assert compose([(normalized, {})], inputs()).weights is None


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (token_truncated, {"cap": 0.0}),
        (sequence_truncated, {"cap": -1.0}),
        (sequence_truncated, {"average": "harmonic"}),
        (token_masked, {"low": 2.0, "high": 0.5}),
        (sequence_masked, {"low": -0.1}),
        (reject, {"low": 0.1, "high": 0.1}),
        (reject, {"estimator": "k4", "high": 1.0}),
        (reject, {"over": "median", "high": 1.0}),
        (veto, {"below": 3.0, "above": 2.0}),
    ],
)
def test_impossible_bounds_are_refused(function, options):
    with pytest.raises(ValueError, match="got"):
        function(inputs(), **options)


def test_what_compares_tokens_needs_to_know_whose_they_are():
    alone = dataclasses.replace(inputs(), trajectory=None)
    with pytest.raises(ValueError, match="whole batch"):
        sequence_truncated(alone)


def scored(batch, gap):
    """The batch as if the learner's log-prob of a drawn token were `gap(trajectory)` above the engine's."""
    gaps = torch.tensor([gap(i) for i in range(len(batch.rewards))])
    return batch.with_micro_batches(
        dataclasses.replace(m, old_logprobs=m.rollout_logprobs + gaps[m.row_to_trajectory]) for m in batch.micro_batches
    )


def test_a_rejected_attempt_leaves_mask_denominator_and_statistics(make_groups):
    batch = pack(make_groups(3, 4, seed=5), max_tokens=80)
    assert len(batch.micro_batches) > 1
    before = batch.num_loss_tokens
    bad = 5  # a member of the second group
    lost = sum(int((m.loss_mask & (m.row_to_trajectory == bad)).sum()) for m in batch.micro_batches)
    result = correct(scored(batch, lambda i: -20.0 if i == bad else 0.0), [(veto, {})])
    assert lost > 0
    assert result.num_loss_tokens == before - lost
    assert result.rejected.nonzero().flatten().tolist() == [bad]
    assert result.metrics["correction/rejected_share"] == pytest.approx(1 / 12)
    assert result.metrics["correction/kept_share"] == pytest.approx(1 - lost / before)
    rest = [i for i in range(4, 8) if i != bad]
    wanted = dict(zip(rest, group_mean(batch.rewards[rest]).tolist(), strict=True))
    advantages = add_advantages(result, group_mean, {})
    for m in advantages.micro_batches:
        for row in m.loss_mask.nonzero().flatten().tolist():
            member = int(m.row_to_trajectory[row])
            assert member != bad
            if member in wanted:
                assert float(m.advantages[row]) == wanted[member]


def test_an_emptied_group_and_an_emptied_batch_are_outcomes(make_groups):
    batch = pack(make_groups(3, 4, seed=5), max_tokens=80)
    one_gone = correct(scored(batch, lambda i: -20.0 if i < 4 else 0.0), [(veto, {})])
    assert one_gone.metrics["correction/empty_groups"] == 1.0
    assert add_advantages(one_gone, group_mean, {}).metrics["advantage/groups"] == 2.0
    all_gone = correct(scored(batch, lambda _: -20.0), [(veto, {}), (token_truncated, {})])
    assert all_gone.is_empty
    assert all_gone.metrics["correction/empty_groups"] == 3.0
    assert all_gone.metrics["correction/ess"] == 0.0
    assert all_gone.metrics["correction/rejected_better_share"] == 1.0
    assert add_advantages(all_gone, group_mean, {}).metrics["advantage/groups"] == 0.0


def test_figures_of_a_corrected_batch(make_groups):
    batch = scored(pack(make_groups(3, 4, seed=5), max_tokens=80), lambda i: 0.1 * (i % 5) - 0.2)
    result = correct(batch, [(token_masked, {"low": 0.85, "high": 1.15})])
    drawn = [(m, m.loss_mask) for m in batch.micro_batches]
    old, rollout = (
        np.concatenate([getattr(m, name)[mask].double().numpy() for m, mask in drawn])
        for name in ("old_logprobs", "rollout_logprobs")
    )
    ratio = np.exp(old - rollout)
    weight = ratio[(ratio >= 0.85) & (ratio <= 1.15)]
    assert 0 < len(weight) < len(ratio)
    figures = result.metrics
    assert figures["correction/ess"] == pytest.approx(weight.sum() ** 2 / (len(weight) * (weight**2).sum()), rel=1e-6)
    assert figures["correction/chi2"] == pytest.approx((ratio**2).mean() - 1, rel=1e-5)
    assert figures["correction/learner_perplexity"] == pytest.approx(np.exp(-old.mean()), rel=1e-6)
    assert figures["correction/engine_perplexity"] == pytest.approx(np.exp(-rollout.mean()), rel=1e-6)


def test_a_learner_scores_when_any_correction_needs_the_batch():
    def needs(*names: str) -> bool:
        return Objective(AlgoConfig(correction=tuple(Plugin(id=name) for name in names))).needs_old_logprobs

    assert not needs()
    assert not needs("none", "token_truncated")
    assert needs("token_truncated", "veto")
    assert [is_token_local(f) for f in (none, token_truncated, sequence_truncated, normalized, veto)] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_corrections_are_bound_in_order_and_checked():
    bound = bound_corrections(AlgoConfig(correction=(Plugin(id="veto", below=0.1), Plugin(id="token_truncated"))))
    assert [(function.__name__, dict(options)) for function, options in bound] == [
        ("veto", {"below": 0.1}),
        ("token_truncated", {}),
    ]
    with pytest.raises(PluginError, match="did you mean 'below'"):
        bound_corrections(AlgoConfig(correction=(Plugin(id="veto", bellow=0.1),)))
