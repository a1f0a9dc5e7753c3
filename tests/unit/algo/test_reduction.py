"""Reductions by hand and in a learner: what a loss token weighs, what the sum is divided by; trust regions likewise."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from keel.algo.advantage import leave_one_out
from keel.algo.apply import add_advantages, set_reduction
from keel.algo.losses import LossInputs, gspo, ppo_clip
from keel.algo.reduction import Reduction, constant_length, sequence_mean, token_mean
from keel.algo.trust_region import divergence, off_policy_sequence
from keel.batch import pack
from keel.config import AlgoConfig, LearnerConfig, ModelConfig, OptimConfig, Plugin, Stage
from keel.learner.learner import Learner


def test_reductions_by_hand():
    tokens = torch.tensor([4, 0, 1])
    assert token_mean(tokens) == Reduction(None, 5.0)
    assert constant_length(tokens, length=8) == Reduction(None, 16.0)
    per_sequence = sequence_mean(tokens)
    assert per_sequence.denominator == 2.0
    assert per_sequence.weights.tolist() == [0.25, 1.0, 1.0]
    with pytest.raises(ValueError, match="length=0"):
        constant_length(tokens, length=0)


def test_all_agree_when_lengths_are_equal():
    tokens, losses = torch.tensor([3, 3]), torch.tensor([2.0, 5.0])
    sums = 3 * losses
    for reduction in (token_mean(tokens), sequence_mean(tokens), constant_length(tokens, length=3)):
        weights = torch.ones(2) if reduction.weights is None else reduction.weights
        assert float((weights * sums).sum() / reduction.denominator) == pytest.approx(3.5)


def test_a_denominator_of_nothing_is_refused(make_groups):
    with pytest.raises(ValueError, match="must be positive"):
        set_reduction(pack(make_groups(2, 3), max_tokens=80), lambda tokens: Reduction(None, 0.0), {})


def make_learner(tiny_checkpoint, **algo):
    path = tiny_checkpoint("qwen3", num_hidden_layers=2)
    learner = Learner(ModelConfig(path=path), LearnerConfig())
    learner.enter(Stage("reinforcement", 0, 10, AlgoConfig(**algo), OptimConfig(max_grad_norm=1e9)))
    return learner


def gradient_of(learner, batch):
    update = learner.backward(learner.score(batch))
    return update, torch.cat([gradient.flatten().double() for gradient in learner.optimizer._gradients.values()])


def make_batch(make_groups):
    return add_advantages(pack(make_groups(2, 3, seed=5), max_tokens=80), leave_one_out, {})


def only(batch, trajectory):
    """The batch with the loss tokens of one trajectory alone."""
    return batch.with_micro_batches(
        dataclasses.replace(m, loss_mask=m.loss_mask & (m.row_to_trajectory == trajectory)) for m in batch.micro_batches
    )


def test_the_learner_divides_by_the_reductions_denominator(tiny_checkpoint, make_groups):
    """A mean over each trajectory, then over trajectories: the average of the gradients that each gives alone."""
    learner, batch = make_learner(tiny_checkpoint), make_batch(make_groups)
    assert len(batch.micro_batches) > 1
    parts = [gradient_of(learner, only(batch, index)) for index in range(len(batch.rewards))]
    wanted = torch.stack([gradient for _, gradient in parts]).mean(0)
    update, found = gradient_of(learner, set_reduction(batch, sequence_mean, {}))
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))
    assert update.num_loss_tokens == batch.num_loss_tokens
    assert update.metrics["policy/loss"] == pytest.approx(sum(part.loss for part, _ in parts) / len(parts), rel=1e-5)

    _, plain = gradient_of(learner, batch)
    _, constant = gradient_of(learner, set_reduction(batch, constant_length, {"length": 7}))
    times = batch.num_loss_tokens / (7 * len(batch.rewards))
    assert torch.allclose(constant, plain * times, rtol=1e-4, atol=1e-6 * float(plain.abs().max()))
    _, same = gradient_of(learner, set_reduction(batch, token_mean, {}))
    assert torch.equal(same, plain)


def test_a_trust_region_stops_the_learners_gradient(tiny_checkpoint, make_groups):
    batch = make_batch(make_groups)
    _, free = gradient_of(make_learner(tiny_checkpoint), batch)
    # The recorded log-probs are random numbers: far from the learner's, on either side.
    narrow = (Plugin(id="divergence", threshold=1e-9),)
    update, stopped = gradient_of(make_learner(tiny_checkpoint, trust_region=narrow), batch)
    assert 0.0 < update.metrics["policy/trust_region_share"] < 1.0
    assert not torch.allclose(free, stopped)
    wide = (Plugin(id="divergence", threshold=1.0), Plugin(id="off_policy_sequence", threshold=1e9))
    update, same = gradient_of(make_learner(tiny_checkpoint, trust_region=wide), batch)
    assert update.metrics["policy/trust_region_share"] == 0.0
    assert torch.equal(free, same)


def test_what_needs_the_engines_log_probs_or_the_sequences_says_so():
    logprobs = torch.zeros(2)
    inputs = LossInputs(logprobs, logprobs, torch.tensor([True, True]), torch.ones(2))
    for region in (divergence, off_policy_sequence):
        with pytest.raises(ValueError, match="engine's log-probs"):
            region(inputs)
    with pytest.raises(ValueError, match="sequence"):
        gspo(inputs)
    with pytest.raises(ValueError, match="dual_clip=1"):
        ppo_clip(inputs, dual_clip=1.0)
    with pytest.raises(ValueError, match="total_variation"):
        divergence(dataclasses.replace(inputs, rollout_logprobs=logprobs - 1), kind="hellinger")


def test_certain_tokens_have_a_finite_divergence():
    """Probabilities of 1 and nearly 0: no NaN, which would pass as inside."""
    mask = torch.tensor([True, True])
    inputs = LossInputs(torch.tensor([0.0, -60.0]), torch.zeros(2), mask, torch.tensor([1.0, -1.0]))
    inputs = dataclasses.replace(inputs, rollout_logprobs=torch.tensor([-60.0, 0.0]))
    for kind in ("total_variation", "kl"):
        assert divergence(inputs, kind=kind, threshold=0.5).tolist() == [False, False]
        back = dataclasses.replace(inputs, advantages=torch.tensor([-1.0, 1.0]))
        assert divergence(back, kind=kind, threshold=0.5).tolist() == [True, True]
