"""A packed batch taken apart again, for tests that look at it sequence by sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from keel.batch import PackedBatch


@dataclass(frozen=True)
class UnpackedSequence:
    """One segment again, out of a packed batch: `n` tokens, and streams about all but the first, never a label."""

    trajectory: int
    segment: int
    token_ids: tuple[int, ...]  # [n]
    loss_mask: tuple[bool, ...]  # [n - 1], about tokens 1 to n - 1
    rollout_logprobs: tuple[float, ...] | None  # [n - 1], likewise
    turn: tuple[int, ...]  # [n - 1], likewise


def unpack(batch: PackedBatch) -> Iterator[UnpackedSequence]:
    """Undo `pack`, sequence by sequence, in its order."""
    for micro_batch in batch.micro_batches:
        bounds = micro_batch.cu_seqlens.tolist()
        segments = micro_batch.sequence_to_segment
        logprobs = micro_batch.rollout_logprobs
        for index, (start, stop) in enumerate(pairwise(bounds)):
            yield UnpackedSequence(
                trajectory=int(micro_batch.sequence_to_trajectory[index]),
                segment=0 if segments is None else int(segments[index]),
                token_ids=(int(micro_batch.input_ids[start]), *micro_batch.labels[start:stop].tolist()),
                loss_mask=tuple(micro_batch.loss_mask[start:stop].tolist()),
                rollout_logprobs=None if logprobs is None else tuple(logprobs[start:stop].tolist()),
                turn=tuple(micro_batch.turn[start:stop].tolist()),
            )
