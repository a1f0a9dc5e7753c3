"""Losses and KL estimators in float64 against hand-derived values and gradients, and torch's own functions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from keel.algo import kl, losses
from keel.algo.losses import LossInputs


def inputs(logprobs, old, advantages):
    leaf = torch.tensor(logprobs, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(len(logprobs), dtype=torch.bool)
    advantages = None if advantages is None else torch.tensor(advantages, dtype=torch.float64)
    return leaf, LossInputs(leaf, torch.tensor(old, dtype=torch.float64), mask, advantages)


# ratio, advantage -> loss, d loss / d logprob, clipped; bounds 0.9 and 1.3
PPO_CASES = [
    (1.0, 2.0, -2.0, -2.0, False),
    (1.2, 2.0, -2.4, -2.4, False),
    (1.5, 2.0, -2.6, 0.0, True),  # likelier than the upper bound and wanted: no more push
    (0.5, 2.0, -1.0, -1.0, False),  # less likely and wanted: pulled back
    (0.5, -2.0, 1.8, 0.0, True),  # below the lower bound and unwanted: no more push
    (1.5, -2.0, 3.0, 3.0, False),  # likelier and unwanted: pulled back
    (0.95, -2.0, 1.9, 1.9, False),
    (1.5, 0.0, 0.0, 0.0, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient", "clipped"), PPO_CASES)
def test_ppo_clip_by_hand(ratio, advantage, loss, gradient, clipped):
    leaf, given = inputs([math.log(ratio) - 1.0], [-1.0], [advantage])
    per_token, metrics = losses.ppo_clip(given, clip_low=0.1, clip_high=0.3)
    per_token.sum().backward()
    assert per_token.item() == pytest.approx(loss, abs=1e-14)
    assert leaf.grad.item() == pytest.approx(gradient, abs=1e-14)
    assert metrics["clip_fraction"].item() == float(clipped)


def test_ppo_clip_on_policy_is_reinforce():
    """At ratio 1 the gradients are the same, and with the detached value the ratio is 1 to the bit."""
    logprobs = [-0.3, -5.0, -40.0]
    leaf, given = inputs(logprobs, logprobs, [1.0, -2.0, 0.5])
    assert given.ratio.tolist() == [1.0, 1.0, 1.0]
    losses.ppo_clip(given)[0].sum().backward()
    other, again = inputs(logprobs, logprobs, [1.0, -2.0, 0.5])
    losses.reinforce(again)[0].sum().backward()
    assert leaf.grad.tolist() == other.grad.tolist() == [-1.0, 2.0, -0.5]


def test_cross_entropy_is_torchs():
    logits = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(7)
    logprobs = logits.log_softmax(-1)[torch.arange(7), labels]
    per_token, _ = losses.cross_entropy(LossInputs(logprobs, logprobs, torch.ones(7, dtype=torch.bool)))
    torch.testing.assert_close(per_token, functional.cross_entropy(logits, labels, reduction="none"))


@pytest.mark.parametrize("function", [losses.ppo_clip, losses.reinforce])
def test_policy_losses_say_when_advantages_are_missing(function):
    _, given = inputs([-1.0], [-1.0], None)
    with pytest.raises(ValueError, match="add_advantages"):
        function(given)


def test_kl_estimators_by_hand():
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.0], dtype=torch.float64)
    assert kl.k1(logprobs, reference).tolist() == [0.5, -1.0]
    assert kl.k2(logprobs, reference).tolist() == [0.125, 0.5]
    expected = [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0]
    assert kl.k3(logprobs, reference).tolist() == pytest.approx(expected, abs=1e-15)
    kl.k3(logprobs, reference).sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([1 - math.exp(-0.5), 1 - math.exp(1.0)], abs=1e-15)


def test_kl_estimators_and_gradients_in_expectation():
    """Summed over the whole distribution: k1 and k3 give KL; the mean gradient of k2 is KL's, that of k1 is zero."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(9, dtype=torch.float64, generator=generator, requires_grad=True)
    reference = torch.randn(9, dtype=torch.float64, generator=generator).log_softmax(-1)
    log_p = logits.log_softmax(-1)
    p = log_p.detach().exp()
    divergence = functional.kl_div(reference, log_p, log_target=True, reduction="sum")
    (exact,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    for estimator in (kl.k1, kl.k3):
        value = (p * estimator(log_p, reference)).sum()
        torch.testing.assert_close(value, divergence, rtol=1e-12, atol=0)
    (of_k1,) = torch.autograd.grad((p * kl.k1(log_p, reference)).sum(), logits, retain_graph=True)
    (of_k2,) = torch.autograd.grad((p * kl.k2(log_p, reference)).sum(), logits, retain_graph=True)
    (of_k3,) = torch.autograd.grad((p * kl.k3(log_p, reference)).sum(), logits, retain_graph=True)
    opposite = functional.kl_div(log_p, reference, log_target=True, reduction="sum")
    (of_opposite,) = torch.autograd.grad(opposite, logits)
    assert float(of_k1.abs().max()) < 1e-14
    torch.testing.assert_close(of_k2, exact, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(of_k3, of_opposite, rtol=1e-10, atol=1e-14)
