"""Rows that fill a micro-batch up to a regular number, so that products of the same few shapes return.

They stand behind the real ones as sequences of their own, which nothing real can see, and are cut off the results:
`keel.ops.matmul` says what for. A pass over the same micro-batch is filled up alike, so its bits return.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from keel.models.info import ModelInfo
from keel.models.shared_rows import SharedRows
from keel.ops.gather import gather_rows
from keel.ops.matmul import padded_rows
from keel.ops.numerics import is_exact, whole_tiles
from keel.ops.support import TokenSupport

if TYPE_CHECKING:
    from keel.batch import MicroBatch


@dataclass(frozen=True)
class PaddedRows:
    """What the model reads of a micro-batch, `[P]` rows of which the first are real.

    With `shared` the trunk reads its computed rows and the head those that it is told of, each filled up; `head_index`
    says which of the trunk's rows the head reads.
    """

    input_ids: torch.Tensor  # [P]
    positions: torch.Tensor  # [P]
    labels: torch.Tensor  # [P']
    temperature: torch.Tensor  # [P']
    attention: Mapping[str, Any]  # what the attention of each layer is told: where sequences lie
    num_tokens: int  # T
    support: TokenSupport | None = None  # of P' labels; padding is not cut
    shared: SharedRows | None = None
    head_index: torch.Tensor | None = None  # [P']

    @property
    def computed(self) -> torch.Tensor | None:
        """[U] int64, the row of the micro-batch that each real row is; None: the rows are the micro-batch's."""
        return None if self.shared is None else self.shared.computed

    def for_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the trunk's states `[P, Hd]`, those that the head reads, `[P', Hd]`."""
        return hidden if self.head_index is None else gather_rows(hidden, self.head_index)

    def of_inputs(self, values: torch.Tensor) -> torch.Tensor:
        """What the trunk says, `[P, ...]`, of each row of the micro-batch, `[T, ...]`."""
        return values[: self.num_tokens] if self.shared is None else gather_rows(values, self.shared.row_to_computed)

    def of_labels(self, values: torch.Tensor) -> torch.Tensor:
        """What the head says, `[P', ...]`, of each row of the micro-batch, `[T, ...]`."""
        return values[: self.num_tokens] if self.shared is None else gather_rows(values, self.shared.row_to_told)

    def check_shared(self, info: ModelInfo) -> None:
        """Raises RuntimeError if a layer has taken computed rows for neighbours in a sequence."""
        asked = info.num_layers if self.shared is None else len(self.attention["keel_shared"].layers)
        if asked != info.num_layers:
            raise RuntimeError(
                f"share_prefixes: {asked} of {info.num_layers} layers of {info.model_type} gathered their keys; the "
                "others mix rows in a way of their own. Set learner.share_prefixes = 'off'"
            )


def pad_rows(micro_batch: MicroBatch, shared: SharedRows | None) -> PaddedRows:
    """What the model reads of `micro_batch`: all of it, or what `shared` says is computed of it."""
    return _pad_whole(micro_batch) if shared is None else _pad_shared(micro_batch, shared)


def _pad_whole(micro_batch: MicroBatch) -> PaddedRows:
    """Fill up to `padded_rows`, in exact mode to whole tiles, no sequence longer than the longest. On a CPU only."""
    num_tokens = micro_batch.num_tokens
    on_cpu = micro_batch.input_ids.device.type == "cpu"
    regular = whole_tiles(num_tokens) if is_exact() else padded_rows(num_tokens)
    extra = regular - num_tokens if on_cpu and micro_batch.max_seqlen > 0 else 0
    places = torch.arange(extra, dtype=micro_batch.positions.dtype, device=micro_batch.positions.device)
    length = max(1, min(extra, micro_batch.max_seqlen))
    ends = [*range(num_tokens + length, num_tokens + extra, length), num_tokens + extra] if extra else []
    bounds = torch.tensor(ends, dtype=micro_batch.cu_seqlens.dtype, device=micro_batch.cu_seqlens.device)
    cu_seqlens = torch.cat((micro_batch.cu_seqlens, bounds)) if extra else micro_batch.cu_seqlens
    lengths = {"max_length_q": micro_batch.max_seqlen, "max_length_k": micro_batch.max_seqlen}
    return PaddedRows(
        functional.pad(micro_batch.input_ids, (0, extra)),
        torch.cat((micro_batch.positions, places % length)),
        functional.pad(micro_batch.labels, (0, extra)),
        functional.pad(micro_batch.temperature, (0, extra), value=1.0),
        {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, **lengths},
        num_tokens,
        support_of(micro_batch, extra),
    )


def _pad_shared(micro_batch: MicroBatch, shared: SharedRows) -> PaddedRows:
    """Trunk and head each filled up likewise; padding is in no sequence at all, so its attention is zero."""
    on_cpu = micro_batch.input_ids.device.type == "cpu"
    computed, told = shared.computed, shared.told
    trunk = padded_rows(len(computed)) - len(computed) if on_cpu else 0
    head = padded_rows(len(told)) - len(told) if on_cpu else 0
    return PaddedRows(
        functional.pad(micro_batch.input_ids[computed], (0, trunk)),
        functional.pad(micro_batch.positions[computed], (0, trunk)),
        functional.pad(micro_batch.labels[told], (0, head)),
        functional.pad(micro_batch.temperature[told], (0, head), value=1.0),
        {"keel_shared": replace(shared.attention, num_rows=len(computed) + trunk, layers=set())},
        micro_batch.num_tokens,
        _support_of_rows(micro_batch, told, head),
        shared,
        functional.pad(shared.row_to_computed[told], (0, head)),
    )


def _support_of_rows(micro_batch: MicroBatch, rows: torch.Tensor, extra: int) -> TokenSupport | None:
    """`support_of` the labels of `rows`, in which all that were cut are."""
    support = support_of(micro_batch)
    if support is None:
        return None
    sizes = functional.pad(support.offsets.diff()[rows], (1, extra))
    return TokenSupport(support.ids, sizes.cumsum(0))


def support_of(micro_batch: MicroBatch, extra: int = 0) -> TokenSupport | None:
    """What the labels were chosen from, followed by `extra` of which nothing was cut; None if nothing was at all."""
    ids, offsets = micro_batch.support_ids, micro_batch.support_offsets
    if ids is None or offsets is None:
        return None
    return TokenSupport(ids, torch.cat((offsets, offsets[-1:].expand(extra))))
