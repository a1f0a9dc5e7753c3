"""Statistics of the gap against a slow twin that adds up token by token, and the peers' figures against formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keel.gap.statistics import PEER_METRICS, gap_statistics, peer_statistics

LOGPROBS = st.floats(-12.0, 0.0, allow_nan=False)
TOKENS = st.lists(st.tuples(LOGPROBS, LOGPROBS, st.integers(0, 3)), min_size=1, max_size=60)


def twin(rollout, learner):
    """Every figure by its formula, in Python's exact sums."""
    n, d = len(rollout), [b - a for a, b in zip(rollout, learner, strict=True)]
    ordered = sorted(map(abs, d))

    def percentile(q):
        place = q / 100 * (n - 1)
        low = math.floor(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, n - 1)] - ordered[low])

    r = [math.exp(each) for each in d]
    return {
        "tokens": n,
        "abs_mean": math.fsum(map(abs, d)) / n,
        **{f"abs_p{q}": percentile(q) for q in (50, 90, 99)},
        "abs_max": ordered[-1],
        "k1": -math.fsum(d) / n,
        "k3": math.fsum(math.expm1(each) - each for each in d) / n,
        "ess": math.fsum(r) ** 2 / (n * math.fsum(each * each for each in r)),
        "chi2": math.fsum(each * each for each in r) / n - 1,
    }


@given(TOKENS)
def test_every_figure_is_its_formula(tokens):
    rollout, learner, _ = zip(*tokens, strict=True)
    found = gap_statistics(np.array(rollout), np.array(learner))
    expected = twin(rollout, learner)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@given(TOKENS)
def test_percentiles_are_those_of_torch(tokens):
    rollout, learner, _ = (np.array(each) for each in zip(*tokens, strict=True))
    found = gap_statistics(rollout, learner)
    expected = torch.quantile(
        torch.from_numpy(np.abs(learner - rollout)), torch.tensor([0.5, 0.9, 0.99], dtype=torch.float64)
    )
    assert [found[f"abs_p{q}"] for q in (50, 90, 99)] == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-12)


@given(TOKENS)
def test_peers_figures_are_their_formulas(tokens):
    """Each written as its source has it, in torch."""
    rollout, learner, owner = (
        torch.tensor(each) for each in zip(*[(a, b, float(c)) for a, b, c in tokens], strict=True)
    )
    rollout, learner = rollout.double(), learner.double()
    found = peer_statistics(rollout.numpy(), learner.numpy(), owner.numpy())
    assert set(found) == {metric.name for metric in PEER_METRICS}
    apart = (learner.exp() - rollout.exp()).abs()  # verl
    assert found["rollout_probs_diff_mean"] == pytest.approx(float(apart.mean()), rel=1e-9, abs=1e-15)
    assert found["rollout_probs_diff_max"] == pytest.approx(float(apart.max()), rel=1e-12)
    deviation = float(apart.std()) if len(apart) > 1 else 0.0
    assert found["rollout_probs_diff_std"] == pytest.approx(deviation, rel=1e-6, abs=1e-12)
    assert found["token_mult_prob_error"] == pytest.approx(float((rollout - learner).abs().exp().mean()), rel=1e-9)
    ratio = (learner - rollout).exp()  # prime-rl
    kl = float((ratio - (learner - rollout) - 1).mean())
    assert found["mismatch_kl"] == pytest.approx(kl, rel=1e-6, abs=1e-9)
    assert found["gen_kl_error"] == found["mismatch_kl"]
    of_rollouts = [float((learner - rollout).abs()[owner == each].mean()) for each in owner.unique()]
    assert found["train_rollout_logprob_abs_diff"] == pytest.approx(
        sum(of_rollouts) / len(of_rollouts), rel=1e-9, abs=1e-12
    )


def test_what_is_said_to_be_ours_is():
    draw = np.random.default_rng(0)
    rollout, learner = -draw.random(200), -draw.random(200)
    ours, theirs = gap_statistics(rollout, learner), peer_statistics(rollout, learner)
    for metric in PEER_METRICS:
        if metric.ours:
            assert theirs[metric.name] == ours[metric.ours]


def test_equal_sides_have_no_gap():
    logprobs = -np.arange(5.0)
    found = gap_statistics(logprobs, logprobs.copy())
    assert {name: found[name] for name in ("abs_max", "k1", "k3", "chi2")} == dict.fromkeys(
        ("abs_max", "k1", "k3", "chi2"), 0
    )
    assert found["ess"] == 1.0
    assert peer_statistics(logprobs, logprobs)["token_mult_prob_error"] == 1.0


def test_the_sign_of_k1_is_that_of_the_engine_against_the_learner():
    """The engine thought the tokens likelier than the learner does."""
    assert gap_statistics(np.array([-1.0]), np.array([-1.5]))["k1"] == 0.5


def test_a_huge_gap_is_infinite_where_it_must_be_and_a_share_where_it_can():
    found = gap_statistics(np.array([-900.0, -1.0]), np.array([-1.0, -1.0]))
    assert found["k3"] == found["chi2"] == math.inf
    assert found["ess"] == pytest.approx(0.5)


def test_no_tokens_have_no_statistics():
    assert gap_statistics(np.array([]), np.array([])) == peer_statistics(np.array([]), np.array([])) == {}


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"token 1 is -2\.0 on the engine's side and nan"):
        gap_statistics(np.array([-1.0, -2.0]), np.array([-1.0, math.nan]))
    with pytest.raises(ValueError, match="shapes"):
        gap_statistics(np.zeros(2), np.zeros(3))


def test_every_band_has_a_source():
    for metric in PEER_METRICS:
        assert metric.source
        assert metric.formula
        assert (metric.healthy_max is None) == (metric.band == "none published")
