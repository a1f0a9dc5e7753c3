"""Keel's estimators against the exact expectation over everything that could be drawn (tests/exact/tabular.py).

Unbiased ones equal the gradient of the expected reward to 1e-10; for the others their bias is derived here, sequence by
sequence and with nothing of Keel's, and must be met just as closely.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from keel.algo import kl
from keel.algo.advantage import group_mean, group_mean_std, leave_one_out
from keel.algo.correction import (
    normalized,
    reject,
    sequence_masked,
    sequence_truncated,
    token_masked,
    token_truncated,
    veto,
)
from keel.algo.losses import cispo, gspo, ppo_clip, reinforce
from keel.algo.reduction import constant_length, sequence_mean, token_mean
from keel.algo.trust_region import divergence, off_policy_sequence
from tests.exact.tabular import (
    LENGTHS,
    SEQUENCES,
    SHAPE,
    STATES,
    Expectation,
    policy_gradient,
    probabilities,
    rewards,
    table,
    token_logprobs,
    token_scores,
)

POLICY, REWARD = table(1), rewards(2)
ENGINE = POLICY + table(3, 0.4)  # log-probs of a token up to 1.5 apart
SCORES = token_scores(POLICY)
RATIOS = [np.exp(p - q) for p, q in zip(token_logprobs(POLICY), token_logprobs(ENGINE), strict=True)]
Weights = Callable[[int], np.ndarray]  # of a sequence: one weight per token, NaN where it is left out


def expected(of_pair: Callable[[int, int], np.ndarray], engine: np.ndarray) -> np.ndarray:
    chances = probabilities(engine)
    pairs = itertools.product(range(len(SEQUENCES)), repeat=2)
    return sum((chances[i] * chances[j] * of_pair(i, j) for i, j in pairs), np.zeros(SHAPE))


def derived(weights: Weights, engine: np.ndarray, *, baseline_of_all: bool = False, mean: bool = False) -> np.ndarray:
    """Minus the expected sum (or token mean) of weight x advantage x score; the advantage is half the difference."""

    def of_pair(i: int, j: int) -> np.ndarray:
        left = {n: ~np.isnan(weights(n)) for n in (i, j)}
        alone = not (left[i].any() and left[j].any())
        half = 0.0 if alone and not baseline_of_all else (REWARD[i] - REWARD[j]) / 2
        total = np.zeros(SHAPE)
        for n, advantage in ((i, half), (j, -half)):
            for t in range(len(SEQUENCES[n])):
                if left[n][t]:
                    total -= weights(n)[t] * advantage * SCORES[n][t]
        tokens = left[i].sum() + left[j].sum()
        return total / tokens if mean and tokens else total

    return expected(of_pair, engine)


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(found - wanted).max() < 1e-10)


def test_the_world_is_whole():
    """The probabilities add up, the scores average to nothing, and the gradient is that of a finite difference."""
    assert len(SEQUENCES) == 15
    assert probabilities(POLICY).sum() == pytest.approx(1.0, abs=1e-15)
    mean_score = sum(p * s.sum(0) for p, s in zip(probabilities(POLICY), SCORES, strict=True))
    assert np.abs(mean_score).max() < 1e-15
    step = np.zeros(SHAPE)
    step[2, 1] = 1e-6
    slope = (probabilities(POLICY + step) - probabilities(POLICY - step)) @ REWARD / 2e-6
    assert policy_gradient(POLICY, REWARD)[2, 1] == pytest.approx(slope, rel=1e-6)
    assert np.abs(policy_gradient(POLICY, REWARD)).max() > 0.05


@pytest.mark.parametrize("loss", [reinforce, ppo_clip])
@pytest.mark.parametrize(("advantage", "times"), [(group_mean, 1), (leave_one_out, 2)])
def test_on_policy_the_gradient_is_the_true_one(loss, advantage, times):
    """G attempts give G - 1 gradients with the mean as a baseline, G with the mean of the others."""
    found = Expectation(POLICY, POLICY, REWARD, advantage, loss).gradient()
    assert close(found, -times * policy_gradient(POLICY, REWARD))


def test_untruncated_sequence_weights_undo_any_mismatch():
    exact = [(sequence_truncated, {"cap": math.inf})]
    found = Expectation(POLICY, ENGINE, REWARD, group_mean, ppo_clip, exact).gradient()
    assert close(found, -policy_gradient(POLICY, REWARD))
    plain = Expectation(POLICY, ENGINE, REWARD, group_mean, ppo_clip).gradient()
    assert np.abs(plain + policy_gradient(POLICY, REWARD)).max() > 0.01  # which is not so without them


def test_the_mean_over_tokens_is_biased_when_lengths_are_random():
    found = Expectation(POLICY, POLICY, REWARD, group_mean, reinforce, reduction=token_mean).gradient()
    assert close(found, derived(lambda n: np.ones(LENGTHS[n]), POLICY, mean=True))
    truth = policy_gradient(POLICY, REWARD)
    scale = -(found * truth).sum() / (truth * truth).sum()
    assert np.abs(found + scale * truth).max() > 0.003  # no multiple of the truth


def test_dividing_by_the_standard_deviation_leaves_the_sign_only():
    def of_pair(i: int, j: int) -> np.ndarray:
        gap = REWARD[i] - REWARD[j]
        advantage = gap / 2 / (abs(gap) / math.sqrt(2) + 1e-6)
        return -advantage * (SCORES[i].sum(0) - SCORES[j].sum(0))

    found = Expectation(POLICY, POLICY, REWARD, group_mean_std, reinforce).gradient()
    assert close(found, expected(of_pair, POLICY))


def test_whitened_advantages_have_mean_0_and_deviation_1_over_a_batchs_tokens():
    def of_pair(i: int, j: int) -> np.ndarray:
        half = (REWARD[i] - REWARD[j]) / 2
        tokens = np.repeat([half, -half], [LENGTHS[i], LENGTHS[j]])
        if half == 0:
            return np.zeros(SHAPE)
        values = (tokens - tokens.mean()) / (tokens.std() + 1e-8)
        return -np.einsum("t,tij->ij", values, np.concatenate([SCORES[i], SCORES[j]]))

    found = Expectation(POLICY, POLICY, REWARD, group_mean, reinforce, whiten=True).gradient()
    assert close(found, expected(of_pair, POLICY))


def whole(value: Callable[[int], float]) -> Weights:
    return lambda n: np.full(LENGTHS[n], value(n))


def kept(inside: Callable[[int], np.ndarray], weight: Weights) -> Weights:
    return lambda n: np.where(inside(n), weight(n), np.nan)


def product(n: int) -> float:
    return math.prod(RATIOS[n])


def geometric(n: int) -> float:
    return math.prod(RATIOS[n]) ** (1 / LENGTHS[n])


ONES = whole(lambda _: 1.0)
K1, K2, K3 = (
    lambda n: -np.log(RATIOS[n]),
    lambda n: np.log(RATIOS[n]) ** 2 / 2,
    lambda n: RATIOS[n] - 1 - np.log(RATIOS[n]),
)
CORRECTIONS: dict[str, tuple[list, Weights]] = {
    "token": ([(token_truncated, {"cap": math.inf})], lambda n: RATIOS[n]),
    "token, capped": ([(token_truncated, {"cap": 1.1})], lambda n: np.minimum(RATIOS[n], 1.1)),
    "sequence, capped": ([(sequence_truncated, {"cap": 1.1})], whole(lambda n: min(product(n), 1.1))),
    "geometric, capped": (
        [(sequence_truncated, {"cap": 1.1, "average": "geometric"})],
        whole(lambda n: min(geometric(n), 1.1)),
    ),
    "token, masked": (
        [(token_masked, {"low": 0.8, "high": 1.5})],
        kept(lambda n: (RATIOS[n] >= 0.8) & (RATIOS[n] <= 1.5), lambda n: RATIOS[n]),
    ),
    "sequence, masked": (
        [(sequence_masked, {"low": 0.7, "high": 1.6})],
        whole(lambda n: product(n) if 0.7 <= product(n) <= 1.6 else math.nan),
    ),
    "geometric, masked": (
        [(sequence_masked, {"low": 0.8, "high": 1.2, "average": "geometric", "weighted": False})],
        whole(lambda n: 1.0 if 0.8 <= geometric(n) <= 1.2 else math.nan),
    ),
    "k1 of a token, above": (
        [(reject, {"estimator": "k1", "over": "token", "high": 0.3})],
        kept(lambda n: K1(n) <= 0.3, ONES),
    ),
    "k1 summed, below": (
        [(reject, {"estimator": "k1", "over": "sum", "low": -0.3})],
        kept(lambda n: np.full(LENGTHS[n], K1(n).sum() >= -0.3), ONES),
    ),
    "k2, worst": (
        [(reject, {"estimator": "k2", "over": "max", "high": 0.05})],
        kept(lambda n: np.full(LENGTHS[n], K2(n).max() <= 0.05), ONES),
    ),
    "k3, mean": (
        [(reject, {"estimator": "k3", "over": "mean", "high": 0.04})],
        kept(lambda n: np.full(LENGTHS[n], K3(n).mean() <= 0.04), ONES),
    ),
    "veto": (
        [(veto, {"below": 0.7})],
        kept(lambda n: np.full(LENGTHS[n], RATIOS[n].min() >= 0.7), ONES),
    ),
    "veto, then weights": (
        [(veto, {"below": 0.7, "above": 2.0}), (token_truncated, {"cap": 1.2})],
        kept(
            lambda n: np.full(LENGTHS[n], RATIOS[n].min() >= 0.7 and RATIOS[n].max() <= 2.0),
            lambda n: np.minimum(RATIOS[n], 1.2),
        ),
    ),
}


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_corrections_bias_is_the_derived_one(name, mean):
    corrections, weights = CORRECTIONS[name]
    found = Expectation(
        POLICY, ENGINE, REWARD, group_mean, ppo_clip, corrections, reduction=token_mean if mean else None
    ).gradient()
    assert close(found, derived(weights, ENGINE, mean=mean))
    nothing = derived(ONES, ENGINE, mean=mean)
    assert np.abs(found - nothing).max() > 1e-4  # the case is no empty one


def test_every_rejection_is_met_from_both_sides():
    """Each rejecting case above leaves something in and something out; else it would prove little."""
    for name, (_, weights) in CORRECTIONS.items():
        left = np.concatenate([~np.isnan(weights(n)) for n in range(len(SEQUENCES))])
        rejects = any(word in name for word in ("masked", "k1", "k2", "k3", "veto"))
        assert left.any(), name
        assert left.all() != rejects, name


def test_rejected_attempts_can_stay_in_the_baseline():
    corrections, weights = CORRECTIONS["sequence, masked"]
    make = partial(Expectation, POLICY, ENGINE, REWARD, group_mean, ppo_clip, corrections)
    inside = make(rejected_in_baseline=True).gradient()
    assert close(inside, derived(weights, ENGINE, baseline_of_all=True))
    assert np.abs(inside - make().gradient()).max() > 1e-3


def test_normalized_weights_have_mean_one_in_every_batch():
    def of_pair(i: int, j: int) -> np.ndarray:
        mean = (RATIOS[i].sum() + RATIOS[j].sum()) / (LENGTHS[i] + LENGTHS[j])
        half = (REWARD[i] - REWARD[j]) / 2
        terms = [(i, half), (j, -half)]
        return -sum(a * np.einsum("t,tij->ij", RATIOS[n] / mean, SCORES[n]) for n, a in terms)

    corrections = [(token_truncated, {"cap": math.inf}), (normalized, {})]
    found = Expectation(POLICY, ENGINE, REWARD, group_mean, ppo_clip, corrections).gradient()
    assert close(found, expected(of_pair, ENGINE))


def test_the_clip_of_a_second_update_is_the_derived_one():
    """The policy has moved away from the one that drew: ratios off 1, some beyond the clip on either side."""
    old = POLICY + table(5, 0.5)
    ratios = [np.exp(p - q) for p, q in zip(token_logprobs(POLICY), token_logprobs(old), strict=True)]
    low, high = 0.8, 1.3

    def of_pair(i: int, j: int) -> np.ndarray:
        half = (REWARD[i] - REWARD[j]) / 2
        total = np.zeros(SHAPE)
        for n, advantage in ((i, half), (j, -half)):
            for t, ratio in enumerate(ratios[n]):
                free = ratio <= high if advantage > 0 else ratio >= low
                total -= free * advantage * ratio * SCORES[n][t]
        return total

    loss = partial(ppo_clip, clip_low=0.2, clip_high=0.3)
    found = Expectation(POLICY, old, REWARD, group_mean, loss, old=old).gradient()
    assert close(found, expected(of_pair, old))
    every = np.concatenate(ratios)
    assert (every < low).any()
    assert (every > high).any()


@pytest.mark.parametrize("estimator", [kl.k1, kl.k2, kl.k3])
def test_a_kl_penaltys_mean_gradient(estimator):
    """k1: nothing. k2: the divergence from the reference, state by state. k3: that of the reference from the policy."""
    reference = POLICY + table(7, 0.5)
    softmax, other = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (POLICY, reference))
    visits = np.zeros(SHAPE[0])
    for states, probability in zip(STATES, probabilities(POLICY), strict=True):
        visits[states] += probability
    gap = np.log(softmax / other)
    of_state = {
        kl.k1: np.zeros(SHAPE),
        kl.k2: softmax * (gap - (softmax * gap).sum(1, keepdims=True)),
        kl.k3: softmax - other,
    }[estimator]

    logits = torch.tensor(POLICY, requires_grad=True)
    states = [state for path in STATES for state in path]
    tokens = [token for sequence in SEQUENCES for token in sequence]
    chances = torch.tensor(np.repeat(probabilities(POLICY), LENGTHS))
    logprobs = logits.log_softmax(-1)[states, tokens]
    fixed = torch.tensor(reference).log_softmax(-1)[states, tokens]
    (chances * estimator(logprobs, fixed)).sum().backward()
    assert logits.grad is not None
    assert close(logits.grad.numpy(), visits[:, None] * of_state)


def test_a_constant_length_leaves_the_gradient_true():
    """Divided by trajectories times a length: the mean over attempts of the true gradient, over that length."""
    reduction = partial(constant_length, length=3)
    found = Expectation(POLICY, POLICY, REWARD, leave_one_out, reinforce, reduction=reduction).gradient()
    assert close(found, -policy_gradient(POLICY, REWARD) / 3)


def test_a_mean_over_each_sequence_is_biased_by_length():
    def of_pair(i: int, j: int) -> np.ndarray:
        half = (REWARD[i] - REWARD[j]) / 2
        return -half * (SCORES[i].mean(0) - SCORES[j].mean(0)) / 2

    found = Expectation(POLICY, POLICY, REWARD, group_mean, reinforce, reduction=sequence_mean).gradient()
    assert close(found, expected(of_pair, POLICY))


OLD = POLICY + table(5, 0.5)
MOVED = [np.exp(p - q) for p, q in zip(token_logprobs(POLICY), token_logprobs(OLD), strict=True)]
Gate = Callable[[int, float], np.ndarray]  # (sequence, advantage) -> factor of each token's advantage x score
FREE = partial(ppo_clip, clip_low=1.0, clip_high=1e9)


def gated(gate: Gate) -> np.ndarray:
    """Minus the expected sum of gate x advantage x score, of pairs that the old policy drew."""

    def of_pair(i: int, j: int) -> np.ndarray:
        half = (REWARD[i] - REWARD[j]) / 2
        return -sum(a * np.einsum("t,tij->ij", gate(n, a), SCORES[n]) for n, a in ((i, half), (j, -half)))

    return expected(of_pair, OLD)


def second(loss, **parts) -> np.ndarray:
    """A second update's expected gradient: the policy has moved away from the one that drew."""
    return Expectation(POLICY, OLD, REWARD, group_mean, loss, old=OLD, **parts).gradient()


def test_cispo_clips_the_weight_and_no_gradient():
    found = second(partial(cispo, clip_low=0.4, clip_high=0.3))
    assert close(found, gated(lambda n, _: np.clip(MOVED[n], 0.6, 1.3)))


def test_gspo_clips_whole_sequences_by_their_geometric_mean():
    cut = set()

    def gate(n: int, advantage: float) -> np.ndarray:
        ratio = math.prod(MOVED[n]) ** (1 / LENGTHS[n])
        free = ratio <= 1.2 if advantage > 0 else ratio >= 0.9
        cut.add(free)
        return np.full(LENGTHS[n], free * ratio / 2 / LENGTHS[n])

    found = second(partial(gspo, clip_low=0.1, clip_high=0.2), reduction=sequence_mean)
    assert close(found, gated(gate))
    assert cut == {True, False}


def test_a_dual_clip_bounds_what_a_bad_token_costs():
    def gate(n: int, advantage: float) -> np.ndarray:
        free = MOVED[n] <= 1.3 if advantage > 0 else (MOVED[n] >= 0.8) & (MOVED[n] <= 1.5)
        return free * MOVED[n]

    found = second(partial(ppo_clip, clip_low=0.2, clip_high=0.3, dual_clip=1.5))
    assert close(found, gated(gate))
    assert not close(found, second(partial(ppo_clip, clip_low=0.2, clip_high=0.3)))


@pytest.mark.parametrize(("kind", "threshold"), [("total_variation", 0.1), ("kl", 0.02)])
def test_a_trust_region_on_probabilities_stops_outward_tokens(kind, threshold):
    now, then = ([np.exp(x) for x in token_logprobs(logits)] for logits in (POLICY, OLD))
    seen = set()

    def gate(n: int, advantage: float) -> np.ndarray:
        q, p = now[n], then[n]
        coin = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
        far = (abs(q - p) if kind == "total_variation" else coin) > threshold
        stopped = far & (q > p if advantage > 0 else q < p)
        seen.update(zip(far.tolist(), stopped.tolist(), strict=True))
        return ~stopped * MOVED[n]

    found = second(FREE, trust_regions=[partial(divergence, kind=kind, threshold=threshold)])
    assert close(found, gated(gate))
    assert seen == {(False, False), (True, False), (True, True)}


def test_the_off_policy_mask_stops_bad_sequences_that_the_policy_left():
    def gate(n: int, advantage: float) -> np.ndarray:
        left = -np.log(MOVED[n]).mean() > 0.1
        return (0.0 if advantage < 0 and left else 1.0) * MOVED[n]

    found = second(FREE, trust_regions=[partial(off_policy_sequence, threshold=0.1)])
    assert close(found, gated(gate))
    assert not close(found, second(FREE))
