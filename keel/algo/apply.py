"""Advantages and corrections, carried out over a packed batch.

Order matters: `correct` first, so that what it leaves out is not in any group's statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from keel.algo.correction.base import BoundCorrection, Correction, CorrectionInputs, compose, is_token_local
from keel.algo.diagnostics import correction_summary, correction_sums
from keel.algo.reduce import masked_sum
from keel.algo.reduction import Reduction
from keel.batch import MicroBatch, PackedBatch

__all__ = ["add_advantages", "correct", "set_reduction", "whiten_advantages"]


def add_advantages(
    batch: PackedBatch,
    advantage: Callable[..., torch.Tensor],
    options: Mapping[str, Any],
    *,
    rejected_in_baseline: bool = False,
    whiten: bool = False,
) -> PackedBatch:
    """Give every loss token the advantage of its trajectory, compared within its group.

    Failed attempts are not in the batch and so in no statistic; nor, unless `rejected_in_baseline`, are trajectories
    that a correction left out whole: the others of their group are compared with what they are trained beside. With
    `whiten` the batch's advantages are then scaled together (`whiten_advantages`).
    Metrics: `advantage/zero_share` (share of groups whose attempts are all alike: no signal), `advantage/groups`.
    Raises ValueError if the function changes the shape or returns a non-finite value.
    """
    per_trajectory = torch.zeros_like(batch.rewards)
    counted = torch.ones_like(batch.trajectory_to_group, dtype=torch.bool)
    if batch.rejected is not None and not rejected_in_baseline:
        counted = ~batch.rejected
    present = batch.trajectory_to_group[counted].unique()
    flat = 0
    for group in present:
        members = ((batch.trajectory_to_group == group) & counted).nonzero().squeeze(1)
        rewards = batch.rewards[members]
        advantages = advantage(rewards, **options)
        if advantages.shape != rewards.shape or not bool(torch.isfinite(advantages).all()):
            raise ValueError(
                f"advantage of rewards {rewards.tolist()}: got {advantages.tolist()}; it must be one finite number each"
            )
        flat += int(bool((advantages == 0).all()))
        per_trajectory[members] = advantages.to(per_trajectory.dtype)
    micro_batches = (_with_advantages(micro_batch, per_trajectory) for micro_batch in batch.micro_batches)
    count = len(present)
    metrics = {"advantage/groups": float(count), "advantage/zero_share": flat / count if count else 0.0}
    advised = batch.with_micro_batches(micro_batches, metrics)
    return whiten_advantages(advised) if whiten else advised


def _with_advantages(micro_batch: MicroBatch, per_trajectory: torch.Tensor) -> MicroBatch:
    rows = per_trajectory.to(micro_batch.input_ids.device)[micro_batch.row_to_trajectory]
    return replace(micro_batch, advantages=torch.where(micro_batch.loss_mask, rows, torch.zeros_like(rows)))


def whiten_advantages(batch: PackedBatch, *, eps: float = 1e-8) -> PackedBatch:
    """`(A - mean) / (std + eps)`, both over the loss tokens of the whole batch, in float64.

    After `group_mean`, the second half of REINFORCE++ with a baseline (Hu et al. 2025, "REINFORCE++", arXiv
    2501.03262). A batch whose advantages are all alike is left as it is: it has no signal to scale up.
    """
    chosen = [m.advantages[m.loss_mask].double() for m in batch.micro_batches if m.advantages is not None]
    every = torch.cat(chosen) if chosen else torch.zeros(0)
    if every.numel() < 2 or bool((every == every[0]).all()):
        return batch
    mean, std = every.mean(), every.std(correction=0) + eps
    whitened = []
    for micro_batch in batch.micro_batches:
        assert micro_batch.advantages is not None
        values = ((micro_batch.advantages.double() - mean) / std).to(micro_batch.advantages.dtype)
        masked = torch.where(micro_batch.loss_mask, values, torch.zeros_like(values))
        whitened.append(replace(micro_batch, advantages=masked))
    return batch.with_micro_batches(whitened)


def set_reduction(batch: PackedBatch, reduction: Callable[..., Reduction], options: Mapping[str, Any]) -> PackedBatch:
    """Fix what each loss token weighs and what each update's sum is divided by, over all its micro-batches and ranks.

    Comes last: it counts the loss tokens that corrections left. Raises ValueError for a denominator that is not
    positive although there is something to learn from.
    """
    micro_batches, denominators = list(batch.micro_batches), []
    for index in range(batch.num_updates):
        first, last = batch.update_bounds[index : index + 2]
        tokens = torch.zeros_like(batch.trajectory_to_group)
        for micro_batch in batch.micro_batches[first:last]:
            rows = micro_batch.row_to_trajectory[micro_batch.loss_mask].cpu()
            tokens.index_add_(0, rows, torch.ones_like(rows))
        made = reduction(tokens, **options)
        if batch.denominators[index] > 0 and not made.denominator > 0:
            raise ValueError(
                f"reduction of {batch.denominators[index]:.0f} loss tokens: got denominator {made.denominator}; it "
                "must be positive where there is something to learn from"
            )
        denominators.append(made.denominator)
        if made.weights is not None:
            for place in range(first, last):
                own = micro_batches[place]
                weights = made.weights.to(own.input_ids.device)[own.row_to_trajectory]
                micro_batches[place] = replace(own, loss_weights=weights)
    return replace(batch.with_micro_batches(micro_batches), loss_denominators=tuple(denominators))


def correct(batch: PackedBatch, corrections: Sequence[BoundCorrection]) -> PackedBatch:
    """Fill `importance_weights` and take rejected tokens out of the loss masks, so out of the denominators too.

    All rows of the batch are judged together, because a trajectory's segments may lie in several micro-batches. A
    batch that was not scored (one update per batch) comes back as it is if all corrections are token-local: the learner
    then makes the weights inside the loss. Metrics `correction/*`. That nothing is left of a group, or of the batch, is
    an outcome and no error: `correction/empty_groups` counts it, and an update without loss tokens changes nothing.
    Raises ValueError if the batch must be scored first.
    """
    if batch.is_empty or not batch.micro_batches or not corrections:
        return batch
    if batch.micro_batches[0].old_logprobs is None:
        if all(is_token_local(function) for function, _ in corrections):
            return batch
        raise ValueError("this correction needs old_logprobs of the whole batch: call the learner's score before it")
    inputs = _joined([correction_inputs(micro_batch) for micro_batch in batch.micro_batches])
    result = compose(corrections, inputs)
    masks = inputs.loss_mask if result.keep is None else inputs.loss_mask & result.keep
    sizes = [micro_batch.num_tokens for micro_batch in batch.micro_batches]
    weights = [None] * len(sizes) if result.weights is None else result.weights.split(sizes)
    corrected = [
        replace(micro_batch, loss_mask=mask, importance_weights=own)
        for micro_batch, mask, own in zip(batch.micro_batches, masks.split(sizes), weights, strict=True)
    ]
    rejected = _rejected(inputs, masks, batch)
    metrics = {**_correction_metrics(inputs, result, masks), **_left(batch, rejected)}
    return replace(batch.with_micro_batches(corrected, metrics), rejected=rejected)


def _rejected(inputs: CorrectionInputs, masks: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """[N] bool: trajectories that had loss tokens and have none left."""
    assert inputs.trajectory is not None
    had, has = (torch.zeros_like(batch.rewards, dtype=torch.bool) for _ in range(2))
    had[inputs.trajectory[inputs.loss_mask].cpu()] = True
    has[inputs.trajectory[masks].cpu()] = True
    return had & ~has


def _left(batch: PackedBatch, rejected: torch.Tensor) -> dict[str, float]:
    """What whole-trajectory rejection cost: shares of trajectories, and of those better than their group; groups."""
    rewards, group = batch.rewards, batch.trajectory_to_group
    sums = rewards.new_zeros(batch.num_groups).index_add(0, group, rewards)
    sizes = rewards.new_zeros(batch.num_groups).index_add(0, group, torch.ones_like(rewards))
    better = rewards > (sums / sizes.clamp(min=1))[group]
    return {
        "correction/rejected_share": float(rejected.float().mean()),
        "correction/rejected_better_share": float((rejected & better).sum() / better.sum().clamp(min=1)),
        "correction/empty_groups": float(len(group.unique()) - len(group[~rejected].unique())),
    }


def _correction_metrics(inputs: CorrectionInputs, result: Correction, masks: torch.Tensor) -> dict[str, float]:
    tokens = float(inputs.loss_mask.sum())
    own = {f"correction/{name}": masked_sum(values, inputs.loss_mask) for name, values in result.metrics.items()}
    sums = {name: float(total) for name, total in correction_sums(inputs, result.weights, masks).items()}
    return {**{name: float(total) / tokens for name, total in own.items()}, **correction_summary(sums)}


def _joined(parts: Sequence[CorrectionInputs]) -> CorrectionInputs:
    """The rows of all micro-batches end to end."""
    streams = {
        name: [getattr(part, name) for part in parts] for name in ("old_logprobs", "rollout_logprobs", "loss_mask")
    }
    trajectories = [part.trajectory for part in parts if part.trajectory is not None]
    return CorrectionInputs(
        **{name: torch.cat(stream) for name, stream in streams.items()}, trajectory=torch.cat(trajectories)
    )


def correction_inputs(micro_batch: MicroBatch, old_logprobs: torch.Tensor | None = None) -> CorrectionInputs:
    """The micro-batch as a correction sees it; `old_logprobs` given (detached) in one-update mode.

    Tokens that nobody drew (demonstrations) get the learner's own log-prob as the engine's: weight 1, by definition.
    """
    old = micro_batch.old_logprobs if old_logprobs is None else old_logprobs
    if old is None:
        raise ValueError("correction: the batch has no old_logprobs; call the learner's score before it")
    rollout = micro_batch.rollout_logprobs
    drawn = micro_batch.policy_version >= 0
    rollout = old if rollout is None else torch.where(drawn, rollout.to(old.dtype), old)
    return CorrectionInputs(old.detach(), rollout.detach(), micro_batch.loss_mask, micro_batch.row_to_trajectory)
