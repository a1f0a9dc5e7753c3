"""The learner's gradient against plain `transformers` in float64, one sequence at a time, with torch's autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from keel.algo.advantage import leave_one_out
from keel.algo.apply import add_advantages
from keel.batch import pack
from keel.config import AlgoConfig, KLConfig, LearnerConfig, ModelConfig, OptimConfig, Plugin, Stage
from keel.learner.learner import Learner
from tests.unpacking import unpack

PRESETS = ("gpt_oss", "qwen3", "qwen3_moe")
CAP = 1.5
ALGO = AlgoConfig(
    correction=(Plugin(id="token_truncated", cap=CAP),), kl=KLConfig(coefficient=0.3), entropy_coefficient=0.05
)


def build(tiny_checkpoint, preset, algo=ALGO, **model):
    path = tiny_checkpoint(preset, num_hidden_layers=2, **({"mlp_only_layers": []} if preset == "qwen3_moe" else {}))
    learner = Learner(ModelConfig(path=path, **model), LearnerConfig())
    learner.enter(Stage("reinforcement", 0, 10, algo, OptimConfig(max_grad_norm=1e9)))
    return learner


def batch_of(make_groups, max_tokens):
    return add_advantages(pack(make_groups(3, 4, seed=5), max_tokens=max_tokens), leave_one_out, {})


def gradient_of(learner, batch):
    update = learner.backward(learner.score(batch))
    return update, {name: gradient.clone() for name, gradient in learner.optimizer._gradients.items()}


def plain_gradient(path, batch, reference_logprobs):
    """Sum over tokens of weight * (-A) * d log p + 0.3 * d k3 - 0.05 * d entropy, over the number of loss tokens."""
    experts = {} if "qwen3_moe" not in path and "gpt_oss" not in path else {"experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager", **experts)
    rows = [row for m in batch.micro_batches for row in zip(m.advantages.tolist(), m.temperature.tolist(), strict=True)]
    start, total = 0, torch.zeros((), dtype=torch.float64)
    for sequence in unpack(batch):
        tokens = torch.tensor([sequence.token_ids])
        stop = start + tokens.shape[1] - 1
        temperature = torch.tensor([row[1] for row in rows[start:stop]], dtype=torch.float64)
        log_p = (model(tokens, use_cache=False).logits[0, :-1] / temperature[:, None]).log_softmax(-1)
        logprobs = log_p.gather(1, tokens[0, 1:, None])[:, 0]
        mask = torch.tensor(sequence.loss_mask)
        weights = (
            (logprobs.detach() - torch.tensor(sequence.rollout_logprobs, dtype=torch.float64)).exp().clamp(max=CAP)
        )
        advantages = torch.tensor([row[0] for row in rows[start:stop]], dtype=torch.float64)
        difference = reference_logprobs[start:stop] - logprobs
        per_token = -weights * advantages * logprobs + 0.3 * (difference.exp() - 1 - difference)
        per_token = per_token + 0.05 * (log_p.exp() * log_p).sum(-1)
        total = total + (per_token * mask).sum()
        start = stop
    (total / batch.num_loss_tokens).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_is_that_of_plain_transformers(tiny_checkpoint, make_groups, preset):
    learner = build(tiny_checkpoint, preset)
    path = learner.config.path
    # A reference that is not the policy: its weights moved a little.
    generator = torch.Generator().manual_seed(0)
    for tensor in learner.reference.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 1e-2)
    batch = batch_of(make_groups, 120)
    scored = learner.score(batch)
    reference = torch.cat([m.ref_logprobs for m in scored.micro_batches]).double()
    expected = plain_gradient(path, batch, reference)
    update, found = gradient_of(learner, batch)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        error = float((gradient.double() - expected[name]).norm() / expected[name].norm().clamp(min=1e-12))
        assert error < 2e-4, (name, error)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert update.grad_norm == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_any_split_and_checkpointing_give_the_same_gradient(tiny_checkpoint, make_groups, preset):
    """1 to 12 micro-batches of unequal numbers of loss tokens; recomputed layers change nothing, to the bit."""
    reference, one = gradient_of(build(tiny_checkpoint, preset), batch_of(make_groups, 10_000))
    for max_tokens in (200, 90, 1):
        update, split = gradient_of(build(tiny_checkpoint, preset), batch_of(make_groups, max_tokens))
        assert update.loss == pytest.approx(reference.loss, rel=1e-5)
        for name, gradient in split.items():
            torch.testing.assert_close(gradient, one[name], rtol=1e-4, atol=1e-6 * reference.grad_norm)
    _, plain = gradient_of(build(tiny_checkpoint, preset), batch_of(make_groups, 90))
    _, again = gradient_of(build(tiny_checkpoint, preset, gradient_checkpointing=True), batch_of(make_groups, 90))
    assert all(torch.equal(gradient, plain[name]) for name, gradient in again.items())


def test_bfloat16_gradients_add_up_in_float32(tiny_checkpoint, make_groups):
    """Sixteen times the same micro-batch gives the gradient of one: no bits lost on the way."""
    algo = AlgoConfig(loss=Plugin(id="cross_entropy"))
    one = build(tiny_checkpoint, "gpt_oss", algo, dtype="bfloat16")
    batch = pack(make_groups(1, 1, demonstration=True), max_tokens=1)
    _, single = gradient_of(one, batch)
    (m,) = batch.micro_batches
    many = dataclasses.replace(
        batch, micro_batches=(m,) * 16, update_bounds=(0, 16), denominators=(16 * batch.denominators[0],)
    )
    _, total = gradient_of(build(tiny_checkpoint, "gpt_oss", algo, dtype="bfloat16"), many)
    for name, gradient in total.items():
        assert gradient.dtype == torch.float32
        # Sixteenths are exact in bfloat16, and so is their sum in float32; added up in bfloat16 they would not be.
        assert torch.equal(gradient, single[name]), name


def test_demonstrations_need_no_rollout_and_no_advantages(tiny_checkpoint, make_groups):
    learner = build(tiny_checkpoint, "gpt_oss", AlgoConfig(loss=Plugin(id="cross_entropy")))
    update = learner.backward(pack(make_groups(2, 2, demonstration=True), max_tokens=100))
    assert update.loss > 1.0
    assert update.finite
    assert not any(name.startswith("mismatch/") for name in update.metrics)
