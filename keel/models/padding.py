"""Rows that fill a micro-batch up to a regular number, so that products of the same few shapes return.

They stand behind the real ones as sequences of their own, which nothing real can see, and are cut off the results:
`keel.ops.matmul` says what for. A pass over the same micro-batch is filled up alike, so its bits return.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from keel.ops.matmul import padded_rows
from keel.ops.numerics import is_exact, whole_tiles
from keel.ops.support import TokenSupport

if TYPE_CHECKING:
    from keel.batch import MicroBatch


@dataclass(frozen=True)
class PaddedRows:
    """What the model reads of a micro-batch, `[P]` rows of which the first T are real."""

    input_ids: torch.Tensor  # [P]
    positions: torch.Tensor  # [P]
    labels: torch.Tensor  # [P]
    temperature: torch.Tensor  # [P]
    cu_seqlens: torch.Tensor  # [S' + 1] int32
    support: TokenSupport | None = None  # of P labels; padding is not cut


def pad_micro_batch(micro_batch: MicroBatch) -> PaddedRows:
    """Fill up to `padded_rows`, in exact mode to whole tiles, no sequence longer than the longest. On a CPU only."""
    num_tokens = micro_batch.num_tokens
    on_cpu = micro_batch.input_ids.device.type == "cpu"
    regular = whole_tiles(num_tokens) if is_exact() else padded_rows(num_tokens)
    extra = regular - num_tokens if on_cpu and micro_batch.max_seqlen > 0 else 0
    if extra == 0:
        return PaddedRows(
            micro_batch.input_ids,
            micro_batch.positions,
            micro_batch.labels,
            micro_batch.temperature,
            micro_batch.cu_seqlens,
            support_of(micro_batch),
        )
    places = torch.arange(extra, dtype=micro_batch.positions.dtype)
    length = min(extra, micro_batch.max_seqlen)
    ends = [*range(num_tokens + length, num_tokens + extra, length), num_tokens + extra]
    return PaddedRows(
        functional.pad(micro_batch.input_ids, (0, extra)),
        torch.cat((micro_batch.positions, places % length)),
        functional.pad(micro_batch.labels, (0, extra)),
        functional.pad(micro_batch.temperature, (0, extra), value=1.0),
        torch.cat((micro_batch.cu_seqlens, torch.tensor(ends, dtype=micro_batch.cu_seqlens.dtype))),
        support_of(micro_batch, extra),
    )


def support_of(micro_batch: MicroBatch, extra: int = 0) -> TokenSupport | None:
    """What the labels were chosen from, followed by `extra` of which nothing was cut; None if nothing was at all."""
    ids, offsets = micro_batch.support_ids, micro_batch.support_offsets
    if ids is None or offsets is None:
        return None
    return TokenSupport(ids, torch.cat((offsets, offsets[-1:].expand(extra))))
