"""Sharing what sequences have in common changes nothing that a learner says or learns: float64, every stream."""

from __future__ import annotations

import dataclasses
import random

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
)
from keel.learner.learner import Learner
from keel.types import Group, Routes, SamplingSettings, Segment, Support, Task, TokenSpan, Trajectory, Turn

VOCAB_SIZE = 320
NUM_LAYERS, NUM_EXPERTS, TOP_K = 2, 6, 2
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
ROUTED = {"gpt_oss": (2, 2, 6), "qwen3_moe": (2, 3, 8)}
CASES = {
    "gpt_oss": ("gpt_oss", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "qwen3_moe": ("qwen3_moe", {}, {}),
    "routes": ("gpt_oss", {"routes": ROUTED["gpt_oss"]}, {}),
    "routes, qwen3_moe": ("qwen3_moe", {"routes": ROUTED["qwen3_moe"]}, {}),
    "supports": ("qwen3", {"cut": True}, {}),
    "balance": ("gpt_oss", {}, {"router": RouterConfig(aux_loss_coefficient=0.1)}),
    "adapter": ("gpt_oss", {}, {"lora": LoraConfig(rank=2)}),
    "checkpointing": ("qwen3_moe", {"routes": ROUTED["qwen3_moe"]}, {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_tokens", [10_000, 150])
def test_everything_comes_out_as_without(tiny_checkpoint, case, max_tokens):
    preset, drawn, model = CASES[case]
    batch = add_advantages(pack(episodes(**drawn), max_tokens=max_tokens), group_mean, {})
    found = [learned(tiny_checkpoint, preset, share, batch, ALGO, **model) for share in ("on", "off")]
    (shared_batch, shared, gradients), (plain_batch, plain, expected) = found
    assert shared.metrics["learner/shared_tokens"] > 0
    assert plain.metrics["learner/shared_tokens"] == 0
    assert shared.metrics["policy/ratio_max_dev"] == shared.metrics["policy/recompute_max_dev"] == 0.0
    for one, other in zip(shared_batch.micro_batches, plain_batch.micro_batches, strict=True):
        for item in dataclasses.fields(one):
            ours, theirs = getattr(one, item.name), getattr(other, item.name)
            if isinstance(ours, torch.Tensor):
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=item.name)  # streams are float32
    same = set(shared.metrics) - {"learner/shared_tokens", "learner/shared_share"}
    assert {name: shared.metrics[name] for name in same} == pytest.approx(
        {name: plain.metrics[name] for name in same}, rel=1e-6, abs=1e-6
    )
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * scale + 1e-12, msg=name)
