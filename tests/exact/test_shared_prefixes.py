"""Sharing what sequences have in common changes nothing that a learner says or learns: float64, every stream."""

from __future__ import annotations

import dataclasses
import random
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from keel.algo.advantage import group_mean
from keel.algo.apply import add_advantages
from keel.batch import pack
from keel.config import (
    AlgoConfig,
    KLConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RouterConfig,
    Stage,
    TrainConfig,
)
from keel.learner.base import LearnerError
from keel.learner.learner import Learner
from keel.models.policy import PolicyModel
from keel.models.router import replay_routes
from keel.ops.rms_norm import rms_norm_reference
from keel.types import Group, Routes, SamplingSettings, Segment, Support, Task, TokenSpan, Trajectory, Turn

VOCAB_SIZE = 320
SMALL = {
    "gpt_oss": {"num_hidden_layers": 2, "sliding_window": 9},
    "qwen3": {"num_hidden_layers": 2},
    "qwen3_moe": {"num_hidden_layers": 2, "mlp_only_layers": []},
}


def span(draw, size, origin, *, sampling=None, routes=None, cut=False):
    tokens = tuple(draw.randrange(VOCAB_SIZE) for _ in range(size))
    told = None if routes is None else made_routes(draw, size, *routes)
    if origin == "context":
        return TokenSpan(tokens, origin, routed_experts=told)
    logprobs = tuple(-5 * draw.random() for _ in tokens)
    support = None
    if cut:
        left = [sorted({token, *draw.sample(range(VOCAB_SIZE), 5)}) for token in tokens]
        ids = torch.tensor([token for row in left for token in row], dtype=torch.int32).numpy().tobytes()
        support = Support(tuple(map(len, left)), ids)
    settings = sampling or SamplingSettings(temperature=0.8)
    return TokenSpan(tokens, origin, logprobs, 0, settings, routed_experts=told, support=support)


def made_routes(draw, size, num_layers, top_k, num_experts):
    values = [each for _ in range(size * num_layers) for each in draw.sample(range(num_experts), top_k)]
    data = torch.tensor(values, dtype=torch.int32).to(torch.uint16).numpy().tobytes()
    return Routes(data, size, num_layers, top_k)


def episodes(num_groups=3, group_size=4, *, seed=0, routes=None, cut=False, shortest=5, longest=30):
    """Ragged groups with a prompt in common, of two turns; each episode has a second sample of what came before, with
    another ending, and one attempt of a group is another's beginning."""
    draw = random.Random(seed)
    sampling = SamplingSettings(temperature=0.7, top_k=6) if cut else None
    made = {"routes": routes, "cut": cut, "sampling": sampling}
    groups = []
    for index in range(num_groups):
        task, attempts = Task(f"task {index}"), []
        prompt = span(draw, draw.randint(shortest, longest), "context", routes=routes)
        for attempt in range(group_size):
            first = span(draw, draw.randint(1, longest), "policy", **made)
            answer = span(draw, draw.randint(1, 9), "context", routes=routes)
            second = span(draw, draw.randint(1, longest), "policy", **made)
            if attempt == group_size - 1:  # begins as the attempt before it, and ends where that has its answer
                first, answer = attempts[-1].segments[0].spans[1:3]
                segments = [Segment((prompt, first))]
            else:
                segments = [Segment((prompt, first, answer, second))]
            # A later sample in which the first reply is context.
            quoted = TokenSpan(first.token_ids, "context", routed_experts=first.routed_experts)
            segments.append(Segment((prompt, quoted, answer, span(draw, draw.randint(1, 9), "policy", **made))))
            turns = (Turn((), "", "stop", 0, 1), Turn((), "", "stop", 1, 3))
            trajectory = Trajectory(task, f"group {index}", attempt, (), turns, tuple(segments), "completed")
            attempts.append(dataclasses.replace(trajectory, reward=draw.random()))
        groups.append(Group(f"group {index}", task, tuple(attempts)))
    return groups


ROUTED = {"gpt_oss": (2, 2, 6), "qwen3_moe": (2, 3, 8)}
CASES = {
    "gpt_oss": ("gpt_oss", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "qwen3_moe": ("qwen3_moe", {"routes": ROUTED["qwen3_moe"]}, {}),
    "routes": ("gpt_oss", {"routes": ROUTED["gpt_oss"]}, {}),
    "supports": ("qwen3", {"cut": True}, {}),
    "adapter": ("gpt_oss", {}, {"lora": LoraConfig(rank=2)}),
    "checkpointing": ("gpt_oss", {"routes": ROUTED["gpt_oss"]}, {"gradient_checkpointing": True}),
}


def in_float64(policy):
    """transformers' norms take a float64 model's states through float32, where sums of gradients round; not here."""
    for module in policy.model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(rms_norm_reference, weight=module.weight, eps=module.variance_epsilon)
    return policy


@pytest.mark.parametrize("case", CASES)
def test_every_output_and_its_gradient(tiny_checkpoint, case):
    """To 1e-12 in float64: log-probs, entropy, router logits, and parameters' gradients of a random sum of them."""
    preset, drawn, options = CASES[case]
    policy = in_float64(PolicyModel.load(tiny_checkpoint(preset, **SMALL[preset]), dtype="float64", **options))
    (m,) = pack(episodes(**drawn), max_tokens=100_000).micro_batches
    routed = policy.info.num_moe_layers > 0
    found = []
    for share in ("on", "off"):
        policy.zero_grad()
        with nullcontext() if m.routed_experts is None else replay_routes(m.routed_experts):
            outputs = policy(
                m,
                share_prefixes=share,
                entropy_grad=True,
                with_routes=routed,
                with_margins=routed,
                with_router_logits=routed,
            )
        assert (outputs.computed is not None) == (share == "on")
        streams = [outputs.logprobs, outputs.entropy, *([outputs.router_logits] if routed else [])]
        generator = torch.Generator().manual_seed(1)
        sum(
            (each * torch.randn(each.shape, generator=generator, dtype=torch.float64)).sum() for each in streams
        ).backward()
        gradients = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.requires_grad}
        found.append((outputs, streams, gradients))
    (shared, streams, gradients), (plain, plain_streams, expected) = found
    assert len(shared.computed) < 0.7 * m.num_tokens
    for ours, theirs in zip(streams, plain_streams, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    if routed:
        assert torch.equal(shared.routes, plain.routes)
        assert torch.equal(shared.own_routes, plain.own_routes)
        torch.testing.assert_close(shared.route_margins, plain.route_margins, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        scale = float(expected[name].abs().max())
        error = float((gradient - expected[name]).abs().max()) / max(scale, 1e-30)
        # The router of qwen3_moe takes its softmax in float32.
        assert error < (1e-6 if preset == "qwen3_moe" else 1e-12), (name, error)


def learner_of(tiny_checkpoint, preset, share, algo, **model):
    path = tiny_checkpoint(preset, **SMALL[preset])
    config = ModelConfig(path=path, **model).model_copy(update={"dtype": "float64"})
    learner = Learner(config, LearnerConfig(share_prefixes=share))
    learner.enter(Stage("reinforcement", 0, 8, algo, OptimConfig(max_grad_norm=1e9)))
    return learner


def learned(tiny_checkpoint, preset, share, batch, algo, **model):
    """(scored batch, update, gradients) of one learner."""
    learner = learner_of(tiny_checkpoint, preset, share, algo, **model)
    for tensor in (learner.reference or {}).values():
        tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3), dtype=tensor.dtype) * 1e-2)
    scored = learner.score(batch)
    update = learner.backward(scored)
    gradients = {name: each.clone() for name, each in learner.optimizer._gradients.items()}
    return scored, update, gradients


ALGO = AlgoConfig(kl=KLConfig(coefficient=0.3), entropy_coefficient=0.05, updates_per_batch=2)
LEARNERS = {
    "routes": ("gpt_oss", {"routes": ROUTED["gpt_oss"]}, {}),
    "supports": ("qwen3", {"cut": True}, {}),
    "balance": ("qwen3_moe", {}, {"router": RouterConfig(aux_loss_coefficient=0.1)}),
}
OF_THE_WORK = {"learner/shared_tokens", "learner/shared_share", "learner/tflop"}


@pytest.mark.parametrize("case", LEARNERS)
def test_a_learner_says_and_learns_the_same(tiny_checkpoint, case):
    """Two micro-batches and more, two updates, a reference; streams and metrics are float32, so to 1e-6."""
    preset, drawn, model = LEARNERS[case]
    batch = add_advantages(pack(episodes(**drawn), max_tokens=150, num_updates=2), group_mean, {})
    found = [learned(tiny_checkpoint, preset, share, batch, ALGO, **model) for share in ("on", "off")]
    (shared_batch, shared, gradients), (plain_batch, plain, expected) = found
    assert shared.metrics["learner/shared_tokens"] > 0
    assert plain.metrics["learner/shared_tokens"] == 0
    assert shared.metrics["learner/tflop"] < 0.9 * plain.metrics["learner/tflop"]
    assert shared.metrics["policy/ratio_max_dev"] == shared.metrics["policy/recompute_max_dev"] == 0.0
    for one, other in zip(shared_batch.micro_batches, plain_batch.micro_batches, strict=True):
        for item in dataclasses.fields(one):
            ours, theirs = getattr(one, item.name), getattr(other, item.name)
            if isinstance(ours, torch.Tensor):
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=item.name)
    same = set(shared.metrics) - OF_THE_WORK
    assert {name: shared.metrics[name] for name in same} == pytest.approx(
        {name: plain.metrics[name] for name in same}, rel=1e-6, abs=1e-6
    )
    for name, gradient in gradients.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6 * scale + 1e-12, msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_passes_share_the_same_rows_whatever_is_known_when(tiny_checkpoint, dtype):
    """Routes that are missing for some are filled in by the score pass, and a correction drops labels: neither may
    change what the training pass shares, or its bits would not be those of the score pass."""
    path = tiny_checkpoint("gpt_oss", **SMALL["gpt_oss"])
    learner = Learner(ModelConfig(path=path, dtype=dtype), LearnerConfig(share_prefixes="on"))
    learner.enter(Stage("reinforcement", 0, 8, ALGO, OptimConfig()))
    batch = add_advantages(pack(episodes(routes=ROUTED["gpt_oss"]), max_tokens=300), group_mean, {})
    draw = torch.Generator().manual_seed(0)

    def partly_known(m):
        unknown = torch.rand(m.num_tokens, generator=draw) < 0.1
        return dataclasses.replace(m, routed_experts=torch.where(unknown[:, None, None], -1, m.routed_experts))

    scored = learner.score(batch.with_micro_batches(map(partly_known, batch.micro_batches)))
    dropped = [
        dataclasses.replace(m, loss_mask=m.loss_mask & (torch.rand(m.num_tokens, generator=draw) < 0.7))
        for m in scored.micro_batches
    ]
    update = learner.backward(scored.with_micro_batches(dropped))
    assert update.metrics["learner/shared_tokens"] > 0
    assert update.metrics["policy/ratio_max_dev"] == update.metrics["policy/recompute_max_dev"] == 0.0


def test_on_is_refused_where_it_cannot_be_had(tiny_checkpoint):
    model = ModelConfig(path=tiny_checkpoint("qwen3", **SMALL["qwen3"]), attention="eager")
    with pytest.raises(LearnerError, match=r"learner\.share_prefixes = \"on\", but attention = 'eager'"):
        Learner(model, LearnerConfig(share_prefixes="on"))
    with pytest.raises(ValueError, match=r"learner\.share_prefixes"):
        TrainConfig(numerics="exact", learner={"share_prefixes": "on"})
