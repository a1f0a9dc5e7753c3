"""The trainer as a whole: experts against a plain loop, neighbours without influence, the same bits twice, memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

from keel.models.experts import experts_layout
from keel.ops.experts import ExpertsWeights, experts_reference
from keel.preflights.checks.attention import TOLERANCE
from keel.preflights.checks.layers import Call, experts_calls, relative
from keel.preflights.context import Context, SkippedError, check
from keel.preflights.result import Check, Status
from keel.preflights.stack import Floats, ScoredSequence
from keel.preflights.trainer_keel import KeelTrainer
from keel.preflights.trainer_plain import PlainTrainer


def check_experts(context: Context) -> Iterator[Check]:
    """Do the experts of every layer compute what a plain loop over experts does, and its gradient?"""
    calls = experts_calls(context)
    try:
        for call in calls:
            experts_layout(call.module)
    except NotImplementedError as error:
        raise SkippedError(f"there is no plain loop to compare with: {error}") from error
    tolerance = TOLERANCE[context.stack.source.dtype]
    errors = {call.layer: _experts_error(call) for call in calls}
    worst, size = max(errors.items(), key=lambda item: item[1])
    yield check(
        "experts",
        "experts equal a plain loop over experts",
        "pass" if size <= tolerance else "fail",
        f"the largest relative error over {len(calls)} layers, values and gradients, is {size:.1e} (layer {worst})",
        figure=size,
        threshold=tolerance,
        unit="relative",
        fix='another experts implementation: model.experts = "keel", "grouped_mm" or "eager"',
        layers=[{"layer": layer, "error": error} for layer, error in errors.items()],
    )


def _experts_error(call: Call) -> float:
    module = call.module
    stored = dict(module.named_parameters())
    layout = experts_layout(module)
    names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    experts = ExpertsWeights(*(stored.get(name) for name in names))  # type: ignore[arg-type]
    chosen, weights = (each.detach() for each in _choice(call))
    hidden = call.hidden.reshape(-1, call.hidden.shape[-1])
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(call.layer)).to(hidden)
    found = []
    for looped in (False, True):
        leaf = hidden.clone().requires_grad_(True)
        with torch.enable_grad():
            out = experts_reference(leaf, chosen, weights, experts, layout) if looped else call.run(leaf)
            out = out.reshape(hidden.shape)
            found.append((out.detach(), torch.autograd.grad((out * direction.to(out.dtype)).sum(), leaf)[0]))
    return max(relative(mine, right) for mine, right in zip(found[0], found[1], strict=True))


def _choice(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts `[T, k]` and their weights `[T, k]`, as they were passed."""
    given = [*call.args[1:], *(value for name, value in call.kwargs.items() if name != "hidden_states")]
    tensors = [each for each in given if isinstance(each, torch.Tensor)]
    chosen = next(each for each in tensors if not each.is_floating_point())
    return chosen, next(each for each in tensors if each.is_floating_point())


def check_neighbours(context: Context) -> Iterator[Check]:
    """Does a sequence's log-prob depend on what is packed or padded beside it?"""
    stack = context.stack
    data = context.probes()
    sequences = [each.scored for each in data.sequences][:6]
    alone = [stack.trainer.score_alone(each).logprobs for each in sequences]
    trainer = stack.trainer
    if isinstance(trainer, PlainTrainer):
        ways = {
            "padded right": trainer.batch_logprobs(sequences, padded="right"),
            "padded left": trainer.batch_logprobs(sequences, padded="left"),
        }
    else:
        ways = {"packed": [scores.logprobs for scores in trainer.score(sequences)]}
    gaps = {name: _mean_gap(alone, values) for name, values in ways.items()}
    name, size = max(gaps.items(), key=lambda item: item[1] if np.isfinite(item[1]) else np.inf)
    threshold = context.noise().threshold
    yield check(
        "neighbours",
        "a sequence does not depend on what lies beside it",
        "pass" if size <= threshold else "fail",
        f"{len(sequences)} sequences scored alone and {' and '.join(ways)}: the mean gap is at most {size:.2g} nats "
        f"({name})",
        figure=size,
        threshold=threshold,
        unit="nats",
        fix="pass attention mask and positions to an attention that honours them, or pack with Keel's",
        gaps=gaps,
    )


def _mean_gap(alone: list[Floats], others: list[Floats]) -> float:
    gaps = np.concatenate([np.abs(a - b)[1:] for a, b in zip(alone, others, strict=True)])
    return float(np.where(np.isfinite(gaps), gaps, np.inf).mean())


def check_recompute(context: Context) -> Iterator[Check]:
    """Under the configured micro-batches: is a second pass equal to the bit, and the ratio of a first update 1?"""
    stack = context.stack
    sequences = [each.scored for each in context.probes().sequences]
    first = [scores.logprobs for scores in stack.trainer.score(sequences)]
    again = [scores.logprobs for scores in stack.trainer.score(sequences)]
    deviations = {"second pass": _largest(first, again)}
    trainer = stack.trainer
    if isinstance(trainer, KeelTrainer):
        deviations["with gradient"] = _largest(first, _with_gradient(trainer, sequences))
    name, size = max(deviations.items(), key=lambda item: item[1])
    exact = isinstance(trainer, KeelTrainer)
    yield check(
        "recompute",
        "the same micro-batches give the same bits",
        "pass" if size == 0 else "fail" if exact else "warn",
        f"the largest deviation of {sum(map(len, first))} log-probs between passes is {size:.3g} ({name}), so "
        f"the ratio of a first update is {'exactly 1' if size == 0 else f'off by up to {np.expm1(size):.2g}'}",
        figure=size,
        threshold=0.0,
        unit="nats",
        fix="deterministic kernels: model.experts = 'keel', or torch.use_deterministic_algorithms(True)",
        deviations=deviations,
    )


def _largest(first: list[Floats], again: list[Floats]) -> float:
    return float(max(np.max(np.abs(a - b)[1:]) for a, b in zip(first, again, strict=True)))


def _with_gradient(trainer: KeelTrainer, sequences: list[ScoredSequence]) -> list[Floats]:
    found = []
    for micro_batch in trainer.micro_batches(sequences):
        values = trainer.policy(micro_batch, with_entropy=False).logprobs.detach().float().cpu().numpy()
        bounds = micro_batch.cu_seqlens.tolist()
        for start, stop in pairwise(bounds):
            found.append(np.concatenate([np.full(1, np.nan, np.float32), values[start:stop]]))
    return found


def check_memory(context: Context) -> Iterator[Check]:
    """Does the run fit the memory that is there?"""
    config = context.stack.config
    if config is None:
        raise SkippedError("there is no run.toml that says how much would be trained at a time")
    from keel.plan import make_plan

    path = context.stack.source.path
    tiny = config.model.tiny.model_copy(update={"preset": ""})
    model = config.model.model_copy(update={"path": path, "tiny": tiny})
    plan = make_plan(config.model_copy(update={"model": model}))
    if plan.device_bytes is None:
        raise SkippedError(f"the device of the run ({plan.device}) is not on this machine")
    share = plan.peak_bytes / plan.device_bytes
    status: Status = "fail" if share > 1 else "warn" if share > 0.9 else "pass"
    yield check(
        "memory",
        "the plan fits the memory that is there",
        status,
        f"{plan.peak_bytes / 2**30:.2f} GiB at most of the {plan.device_bytes / 2**30:.1f} GiB of {plan.device}: "
        f"{plan.verdict}",
        figure=plan.peak_bytes / 2**30,
        threshold=plan.device_bytes / 2**30,
        unit="GiB",
        fix="lower engine.slots, rollout.max_sequence_tokens or batch.max_tokens; checkpoint; or an adapter",
    )
