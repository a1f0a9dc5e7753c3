"""Advantages and corrections, carried out over a packed batch.

Order matters: `correct` first, so that what it leaves out is not in any group's statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from keel.algo.correction import Correction, CorrectionInputs, is_token_local
from keel.algo.reduce import masked_sum
from keel.batch import MicroBatch, PackedBatch

__all__ = ["add_advantages", "correct"]


def add_advantages(
    batch: PackedBatch, advantage: Callable[..., torch.Tensor], options: Mapping[str, Any]
) -> PackedBatch:
    """Give every loss token the advantage of its trajectory, compared within its group.

    Failed attempts are not in the batch and so in no statistic. Metrics: `advantage/zero_share` (share of groups whose
    attempts are all alike: no signal), `advantage/groups`. Raises ValueError if the function changes the shape or
    returns a non-finite value.
    """
    per_trajectory = torch.zeros_like(batch.rewards, dtype=torch.float32)
    present = batch.trajectory_to_group.unique()
    flat = 0
    for group in present:
        members = (batch.trajectory_to_group == group).nonzero().squeeze(1)
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
    return batch.with_micro_batches(micro_batches, metrics)


def _with_advantages(micro_batch: MicroBatch, per_trajectory: torch.Tensor) -> MicroBatch:
    rows = per_trajectory.to(micro_batch.input_ids.device)[micro_batch.row_to_trajectory]
    return replace(micro_batch, advantages=torch.where(micro_batch.loss_mask, rows, torch.zeros_like(rows)))


def correct(batch: PackedBatch, correction: Callable[..., Correction], options: Mapping[str, Any]) -> PackedBatch:
    """Fill `importance_weights` from `old_logprobs` and `rollout_logprobs`; metrics `correction/*`.

    A batch that was not scored (one update per batch) comes back as it is if the correction is token-local: the
    learner then makes the weights inside the loss. Raises ValueError if it is not, or if the batch was scored but
    nobody recorded what the engine thought of its tokens.
    """
    if batch.is_empty or not batch.micro_batches:
        return batch
    if batch.micro_batches[0].old_logprobs is None:
        if is_token_local(correction):
            return batch
        raise ValueError("this correction needs old_logprobs of the whole batch: call the learner's score before it")
    totals: dict[str, torch.Tensor] = {}
    corrected = []
    for micro_batch in batch.micro_batches:
        result = correction(correction_inputs(micro_batch), **options)
        corrected.append(replace(micro_batch, importance_weights=result.weights))
        for name, values in result.metrics.items():
            total = masked_sum(values, micro_batch.loss_mask)
            totals[name] = totals[name] + total if name in totals else total
    metrics = {f"correction/{name}": float(total) / batch.num_loss_tokens for name, total in totals.items()}
    return batch.with_micro_batches(corrected, metrics)


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
    return CorrectionInputs(old.detach(), rollout.detach(), micro_batch.loss_mask)
