"""What it saves to compute once what sequences have in common: the learner's update with and without, alternately."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from keel.algo.advantage import group_mean
from keel.algo.apply import add_advantages
from keel.batch import PackedBatch, pack
from keel.bench.measure import (
    BenchError,
    BenchResult,
    alternately,
    command_line,
    forget_peak,
    machine,
    peak_resident_bytes,
    require_close,
)
from keel.config import AlgoConfig, LearnerConfig, ModelConfig, OptimConfig, Stage
from keel.learner.base import Update
from keel.learner.learner import Learner
from keel.models.shared_rows import Share
from keel.models.tiny import build_tiny_model
from keel.types import Group, SamplingSettings, Segment, Task, TokenSpan, Trajectory

VOCAB_SIZE = 2048
MODEL: Mapping[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 64,
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Case:
    """Groups of attempts: tokens of the prompt that a group has in common, and at most so many drawn."""

    prompt: int
    reply: int
    attempts: int = 8
    groups: int = 2

    @classmethod
    def read(cls, text: str) -> Case:
        """ "512x64": a prompt of 512 tokens and replies of up to 64. Raises BenchError for anything else."""
        prompt, _, reply = text.strip().partition("x")
        if not (prompt.isdigit() and reply.isdigit() and int(prompt) > 0 and int(reply) > 1):
            raise BenchError(f"case {text!r}: give it as PROMPTxREPLY in tokens, like 512x64")
        return cls(int(prompt), int(reply))

    def __str__(self) -> str:
        return f"{self.groups} groups of {self.attempts}, {self.prompt} + {self.reply // 2}..{self.reply} tokens"


def batch_of(case: Case, seed: int = 0) -> PackedBatch:
    """Made-up attempts of ragged lengths, packed into one micro-batch."""
    draw = random.Random(seed)
    settings = SamplingSettings()

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(VOCAB_SIZE) for _ in range(count))

    def attempts(group: str, task: Task) -> Iterator[Trajectory]:
        prompt = TokenSpan(tokens(case.prompt), "context")
        for attempt in range(case.attempts):
            drawn = tokens(draw.randint(case.reply // 2, case.reply))
            reply = TokenSpan(drawn, "policy", tuple(-draw.random() for _ in drawn), 0, settings)
            made = Trajectory(task, group, attempt, (), (), (Segment((prompt, reply)),), "completed")
            yield dataclasses.replace(made, reward=draw.random())

    groups = [
        Group(f"{index}", Task(f"{index}"), tuple(attempts(f"{index}", Task(f"{index}"))))
        for index in range(case.groups)
    ]
    return add_advantages(
        pack(groups, max_tokens=case.groups * case.attempts * (case.prompt + case.reply)), group_mean, {}
    )


def learner_of(path: str, dtype: str) -> Learner:
    """A learner of the benchmark's model, without recompute checks."""
    learner = Learner(ModelConfig.model_validate({"path": path, "dtype": dtype}), LearnerConfig(recompute_every=0))
    learner.enter(Stage("reinforcement", 0, 1, AlgoConfig(), OptimConfig()))
    return learner


def update(learner: Learner, batch: PackedBatch, share: Share) -> Update:
    """The gradient of the batch, and what it looks like."""
    learner.acting.share_prefixes = share
    return learner.backward(batch)


def _said(found: Update) -> torch.Tensor:
    """The log-prob of every row, context included, and the gradient's size."""
    logprobs = [found.streams[index]["logprobs"] for index in sorted(found.streams)]
    return torch.cat([*logprobs, torch.tensor([found.grad_norm])])


def measure_prefixes(cases: Sequence[str], *, dtype: str = "float32", rounds: int = 5) -> BenchResult:
    """One row a case, as `Case.read` reads it.

    Raises BenchError for an unknown case or type, and if log-probs or the gradient size differ by more than rounding.
    """
    wanted = [Case.read(text) for text in cases]
    if dtype not in TOLERANCE:
        raise BenchError(f"dtype {dtype!r} is not measured; known: {', '.join(TOLERANCE)}")
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="keel-bench-") as path:
        build_tiny_model("gpt_oss", path, vocab_size=VOCAB_SIZE, **MODEL)
        learner = learner_of(path, dtype)
    rows = [_measured(case, learner, dtype, rounds) for case in wanted]
    notes = ("ours: what sequences have in common is computed once; peer: the same learner without that",)
    return BenchResult("prefixes", command_line(), facts, rows, notes)


def _measured(case: Case, learner: Learner, dtype: str, rounds: int) -> dict[str, Any]:
    batch = batch_of(case)
    shared, plain = update(learner, batch, "on"), update(learner, batch, "off")
    apart = require_close(str(case), _said(shared), _said(plain), tolerance=TOLERANCE[dtype])
    peaks = [_peak(learner, batch, share) for share in ("on", "off")]
    times = alternately(
        {"shared": lambda: update(learner, batch, "on"), "plain": lambda: update(learner, batch, "off")}, rounds=rounds
    )
    ratio = times.ratio("plain", "shared")
    return {
        "case": f"{case}, {dtype}",
        "ours": "shared",
        "peer": "not shared",
        "tokens": sum(each.num_tokens for each in batch.micro_batches),
        "saved_share": shared.metrics["learner/shared_share"],
        "ours_ms": 1e3 * times.median("shared"),
        "peer_ms": 1e3 * times.median("plain"),
        "ratio": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "ours_mib": peaks[0],
        "peer_mib": peaks[1],
        "equal_to": apart,
    }


def _peak(learner: Learner, batch: PackedBatch, share: Share) -> float:
    before = forget_peak()
    update(learner, batch, share)
    return max(0, peak_resident_bytes() - before) / 2**20
