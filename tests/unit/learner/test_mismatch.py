"""Learner against engine: the sums, routing differences, and which outliers a near-tie explains."""

from __future__ import annotations

import math

import pytest
import torch

from keel.batch import MicroBatch
from keel.dist.ranks import Ranks
from keel.learner.mismatch import add_mismatch, compare_routes, explained_by_routes, mismatch_metrics
from keel.learner.stats import Stats, ratio_deviation
from keel.models.policy import TokenOutputs


def micro_batch(lengths, rollout, routes=None, mask=None):
    total = sum(lengths)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    zeros = torch.zeros(total, dtype=torch.int64)
    return MicroBatch(
        input_ids=zeros,
        positions=zeros,
        labels=zeros,
        loss_mask=torch.ones(total, dtype=torch.bool) if mask is None else torch.tensor(mask),
        cu_seqlens=bounds,
        sequence_to_trajectory=torch.zeros(len(lengths), dtype=torch.int64),
        policy_version=torch.zeros(total, dtype=torch.int32),
        temperature=torch.ones(total),
        turn=zeros.int(),
        max_seqlen=max(lengths),
        rollout_logprobs=torch.tensor(rollout),
        routed_experts=routes,
    )


def metrics_of(m, logprobs, routes=None, margins=None):
    stats = Stats()
    outputs = TokenOutputs(torch.tensor(logprobs), None, routes=routes, own_routes=routes, route_margins=margins)
    add_mismatch(stats, m, outputs.logprobs, outputs)
    return mismatch_metrics(*stats.collect(Ranks()))


def test_by_hand():
    m = micro_batch([3], [-1.0, -2.0, -9.0], mask=[True, True, False])
    found = metrics_of(m, [-1.5, -1.0, 0.0])
    assert found["mismatch/abs_mean"] == pytest.approx(0.75)
    assert found["mismatch/abs_max"] == 1.0
    assert found["mismatch/k1"] == pytest.approx((0.5 - 1.0) / 2)
    # d = learner - engine: -0.5 and 1.0
    expected = ((math.exp(-0.5) - 1 + 0.5) + (math.exp(1.0) - 1 - 1.0)) / 2
    assert found["mismatch/k3"] == pytest.approx(expected, rel=1e-6)
    assert found["mismatch/outliers"] == 2.0
    assert found["mismatch/outlier_share"] == 1.0
    assert "mismatch/route_diff" not in found


def test_a_gap_that_is_no_number_is_an_outlier_and_infinite():
    found = metrics_of(micro_batch([2], [-1.0, -1.0]), [-1.0, math.nan])
    assert found["mismatch/abs_max"] == math.inf
    assert found["mismatch/outliers"] == 1.0


def test_routes_are_compared_as_sets_where_known():
    engine = torch.tensor([[[1, 2]], [[1, 2]], [[1, 2]], [[-1, -1]]], dtype=torch.int32)
    learner = torch.tensor([[[1, 2]], [[2, 1]], [[1, 3]], [[4, 5]]], dtype=torch.int32)
    known, different = compare_routes(engine, learner)
    assert known[:, 0].tolist() == [True, True, True, False]
    assert different[:, 0].tolist() == [False, False, True, False]


def test_only_the_causal_past_explains():
    """A near-tie at row 1 of the first sequence explains rows 1 and later of it, not row 0, not the next sequence."""
    m = micro_batch([4, 3], [0.0] * 7)
    near_tie = torch.zeros(7, 2, dtype=torch.bool)
    near_tie[1, 1] = True
    assert explained_by_routes(near_tie, m).tolist() == [False, True, True, True, False, False, False]


def test_outliers_explained_by_a_near_tie():
    routes = torch.zeros(4, 1, 2, dtype=torch.int32)
    routes[:, 0, 1] = 1
    other = routes.clone()
    other[1, 0, 1] = 2
    margins = torch.full((4, 1), 1.0)
    margins[1, 0] = 1e-5
    logprobs = [-1.0, -1.1, -1.1, -1.1]  # rows 1, 2 of the first sequence and row 3, the second, are outliers
    m = micro_batch([3, 1], [-1.0] * 4, routes=routes)
    found = metrics_of(m, logprobs, other, margins)
    assert found["mismatch/outliers"] == 3.0
    assert found["mismatch/outliers_routed"] == 2.0
    assert found["mismatch/route_diff"] == 0.25
    margins[1, 0] = 0.5  # routed differently, but far from a tie: no explanation
    assert metrics_of(m, logprobs, other, margins)["mismatch/outliers_routed"] == 0.0


def test_without_the_engines_routes_near_ties_are_the_learners_own():
    """Of tokens 0 to 2 and 3 (another sequence), a near-tie at 1 lies before 1 and 2; outliers are 2 and 3."""
    routes = torch.zeros(4, 1, 2, dtype=torch.int32)
    margins = torch.tensor([[1.0], [1e-5], [1.0], [1.0]])
    found = metrics_of(micro_batch([3, 1], [-1.0] * 4), [-1.0, -1.0, -1.1, -1.1], routes, margins)
    assert found["mismatch/outliers"] == 2.0
    assert found["mismatch/outliers_near_tie"] == 1.0
    assert found["mismatch/near_tie_share"] == 0.5
    assert "mismatch/outliers_routed" not in found


def test_ratio_deviation_is_exact_and_loses_no_nan():
    a = torch.tensor([-1.0, -math.inf, math.nan, -1.0, -math.inf])
    b = torch.tensor([-1.0, -math.inf, -1.0, -1.0 - 2.0**-20, -1.0])
    found = ratio_deviation(a, b).tolist()
    assert found[:3] == [0.0, 0.0, math.inf]
    assert found[3] == pytest.approx(2.0**-20, rel=1e-3)
    assert found[4] == pytest.approx(1.0)
