"""Weights that arrive: every tensor group is changed, pushed, seen by both sides, and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from keel.preflights.context import Context, SkippedError, check
from keel.preflights.probes import random_tokens
from keel.preflights.result import Check
from keel.preflights.stack import Floats, ScoredSequence
from keel.sync.base import WeightSource
from keel.sync.groups import tensor_groups
from keel.sync.transports import write_weights
from keel.types import Fault

FOLLOWS = 0.1
"""The engine follows a change if the gap left is at most this share of what the change did to the trainer."""
MOVES = 0.3
"""Where both sides differ anyway: it follows if its own log-probs change by this share of that, or by more than noise.

How much they change says nothing then: it is another model that is changed."""
STRENGTHS = (0.2, 1.0)
"""Size of the random change against the tensor's own; the second where the first does not show above noise."""


class Sender:
    """The trainer's weights, as `keel.sync.publish` takes them."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        self.parameters, self.version = parameters, 0

    def weights_to(self, source: WeightSource) -> None:
        """Leave them at `source`; "shared" needs nothing."""
        if source.kind != "shared":
            whole = {name: value.detach() for name, value in self.parameters.items()}
            write_weights(source.location, whole, version=self.version)


def check_weights(context: Context) -> Iterator[Check]:
    """Does a push of each tensor group reach the engine, and are the old weights back afterwards?"""
    stack = context.stack
    if not stack.engine.may_push:
        raise SkippedError("nothing is pushed to a server that was attached to; --allow-weight-push allows it")
    able = stack.engine.capabilities()
    if not able.weight_sources:
        raise SkippedError(f"{able.name} takes no weights")
    parameters = _published(context)
    groups = tensor_groups(parameters)
    sequences = _sequences(context)
    sender = Sender(parameters)
    stale: list[str] = []
    unseen: list[str] = []
    left: dict[str, float] = {}
    gaps: dict[str, float] = {}
    version = stack.engine.health().policy_version
    noise = context.noise().threshold
    before = _by_trainer(context, sequences)
    agreed = _mean_gap(before, _by_engine(context, sequences)) <= noise
    version += 1
    _push(context, sender, version)  # as a run begins: what is late, or kept back, is so from then on
    start = _by_engine(context, sequences)
    agrees = _mean_gap(before, start) <= noise
    for number, (group, names) in enumerate(groups.items()):
        if number and context.left_s <= 0:
            unseen.append(group)
            continue
        version += 1
        effect, gap, moved = 0.0, 0.0, 0.0
        for strength in STRENGTHS:
            with _changed({name: parameters[name] for name in names}, strength):
                effect, gap, moved = _pushed(context, sender, sequences, version, before, start)
            if effect > 4 * noise:
                break
        left[group], gaps[group] = gap / max(effect, 1e-30), gap
        if effect <= 2 * noise:
            unseen.append(group)
        elif (gap > max(FOLLOWS * effect, noise)) if agrees else (moved < min(MOVES * effect, noise)):
            stale.append(group)
    version += 1
    _push(context, sender, version)
    back = _mean_gap(start, _by_engine(context, sequences))
    problem = f"pushed and not followed: {', '.join(stale)}" if stale else ""
    if not problem and agreed and not agrees:
        problem = f"a push of the very same weights leaves a gap of {_mean_gap(before, start):.2g} nats"
    elif not problem and back > noise:
        problem = f"after the old weights were pushed back, a gap of {back:.2g} nats is left"
    seen = len(groups) - len(unseen)
    follows_none = len(stale) > 1 and len(stale) == seen
    note = f"; no change to be seen or no time for: {', '.join(unseen)}" if unseen else ""
    yield check(
        "weights",
        "every tensor group that is pushed arrives",
        "fail" if problem else "pass",
        (problem or f"{seen} of {len(groups)} tensor groups were changed, pushed, followed and put back") + note,
        figure=float(len(stale)),
        threshold=0.0,
        unit="groups",
        fix="load these groups as the engine lays them out; Keel's worker extension for vLLM does",
        stale=stale,
        cause="" if not stale else "stale_version" if follows_none else "stale_tensor_group",
        unseen=unseen,
        left=left,
        gaps=gaps,
    )


def _published(context: Context) -> dict[str, torch.Tensor]:
    """What a run would publish, by name: an adapter's factors, else all."""
    policy = getattr(context.stack.trainer, "policy", None)
    named = context.stack.trainer.model.named_parameters() if policy is None else policy.trained_parameters().items()
    return dict(named)


def _sequences(context: Context) -> list[ScoredSequence]:
    rng = random.Random(f"weights {context.plan.seed}")
    sizes = [min(48, context.plan.max_sequence_tokens), min(80, context.plan.max_sequence_tokens)]
    tokens = [np.array(random_tokens(context.stack, rng, size), np.int64) for size in sizes]
    return [ScoredSequence(each, np.zeros(len(each), np.bool_)) for each in tokens]


def _pushed(
    context: Context,
    sender: Sender,
    sequences: Sequence[ScoredSequence],
    version: int,
    before: Sequence[Floats],
    start: Sequence[Floats],
) -> tuple[float, float, float]:
    """What the change at hand does to the trainer's log-probs (`before` without it), the gap that is left once it is
    pushed, and what it does to the engine's (`start` without it)."""
    after = _by_trainer(context, sequences)
    _push(context, sender, version)
    answered = _by_engine(context, sequences)
    return _mean_gap(before, after), _mean_gap(after, answered), _mean_gap(start, answered)


def _push(context: Context, sender: Sender, version: int) -> None:
    sender.version = version
    try:
        context.stack.engine.publish(sender, version)
    except Fault as error:
        raise SkippedError(f"the engine refuses a push: {error}") from error


@contextmanager
def _changed(group: Mapping[str, torch.Tensor], strength: float) -> Iterator[None]:
    """In this context the tensors have noise of `strength` times their own size added; then the old bits again."""
    generator = torch.Generator().manual_seed(11)
    before = {name: tensor.detach().clone() for name, tensor in group.items()}
    try:
        with torch.no_grad():
            for tensor in group.values():
                size = tensor.float().pow(2).mean().sqrt().clamp_min(0.02)
                drawn = torch.randn(tensor.shape, generator=generator).to(tensor.device)
                tensor.copy_((tensor.float() + strength * size * drawn).to(tensor.dtype))
        yield
    finally:
        with torch.no_grad():
            for name, tensor in group.items():
                tensor.copy_(before[name])


def _by_trainer(context: Context, sequences: Sequence[ScoredSequence]) -> list[Floats]:
    return [scores.logprobs[1:] for scores in context.stack.trainer.score(sequences)]


def _by_engine(context: Context, sequences: Sequence[ScoredSequence]) -> list[Floats]:
    results = context.stack.engine.score([each.token_ids.tolist() for each in sequences])
    return [np.asarray(result.logprobs, np.float32) for result in results]


def _mean_gap(first: Sequence[Floats], second: Sequence[Floats]) -> float:
    gaps = np.concatenate([np.abs(a - b) for a, b in zip(first, second, strict=True)])
    return float(np.where(np.isfinite(gaps), gaps, np.inf).mean())
