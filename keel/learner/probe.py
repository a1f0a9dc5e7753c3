"""What a weight check asks of a learner: log-probs of plain tokens, and weights changed for a moment.

Every rank must make the same calls in the same order: each scores every sequence, on its shard of the weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from keel.batch import MicroBatch
from keel.learner.base import LearnerError

if TYPE_CHECKING:
    from keel.learner.learner import Learner

Change = Literal["noise", "zero"]
SMALLEST_RMS = 0.02
"""What counts as the size of a tensor of zeros (a bias at its start, an adapter's second factor)."""


def plain_micro_batch(token_ids: Sequence[int]) -> MicroBatch:
    """A given sequence of n tokens as a micro-batch of n - 1 rows, at temperature 1, nothing of it to be learned."""
    tokens = torch.as_tensor(token_ids, dtype=torch.int64)
    rows = len(tokens) - 1
    return MicroBatch(
        input_ids=tokens[:-1],
        positions=torch.arange(rows),
        labels=tokens[1:],
        loss_mask=torch.zeros(rows, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, rows], dtype=torch.int32),
        sequence_to_trajectory=torch.zeros(1, dtype=torch.int64),
        policy_version=torch.full((rows,), -1, dtype=torch.int32),
        temperature=torch.ones(rows),
        turn=torch.full((rows,), -1, dtype=torch.int32),
        max_seqlen=rows,
    )


@torch.no_grad()
def score_tokens(learner: Learner, sequences: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]:
    """Of each sequence of n tokens, n - 1 log-probs: of every token after the first, given what precedes it."""
    scored = []
    for token_ids in sequences:
        micro_batch = plain_micro_batch(token_ids).to(learner.device)
        scored.append(tuple(learner.policy(micro_batch, with_entropy=False).logprobs.tolist()))
    return tuple(scored)


@torch.no_grad()
def change_weights(
    learner: Learner, names: Sequence[str], change: Change, seed: int, saved: dict[str, torch.Tensor]
) -> None:
    """Add noise as large as a parameter is (its root mean square), or set it to zero; its own values go to `saved`,
    unless they are there already.

    The noise depends on the seed and the parameter's name alone, not on ranks. Raises LearnerError for a name that is
    not trained.
    """
    parameters = learner.parameters()
    if unknown := sorted(set(names) - set(parameters)):
        raise LearnerError(f"change_weights: {unknown[0]} is no trained parameter of {learner.config.path}")
    for name in names:
        parameter = parameters[name].detach()
        local = learner.ranks.local(parameter)
        saved.setdefault(name, local.clone())
        if change == "zero":
            local.zero_()
            continue
        whole = learner.ranks.gather(local, parameter)
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
        noise = torch.randn(whole.shape, generator=generator).to(whole.device)
        size = max(float(whole.float().square().mean().sqrt()), SMALLEST_RMS)
        local.copy_(learner.ranks.part((whole.float() + size * noise).to(whole.dtype), parameter))


@torch.no_grad()
def restore_weights(learner: Learner, saved: dict[str, torch.Tensor]) -> None:
    """Put the values in `saved` back, to the bit, and forget them."""
    parameters = learner.parameters()
    for name, values in saved.items():
        learner.ranks.local(parameters[name].detach()).copy_(values)
    saved.clear()
