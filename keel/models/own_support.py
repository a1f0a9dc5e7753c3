"""The cut that a model would make itself: in the place of one that no engine told, and to compare with one it did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from keel.models.padding import support_of
from keel.ops.logprobs import scaled_logits
from keel.ops.support import TokenSupport, differs_from_own_cut, own_cut

if TYPE_CHECKING:
    from keel.batch import MicroBatch


@torch.no_grad()
def own_support(
    hidden: torch.Tensor, head: nn.Linear, micro_batch: MicroBatch, chunk_tokens: int, wide: bool
) -> TokenSupport | None:
    """What each label was chosen from: as the micro-batch says, and where that is missing, the model's own cut.

    `hidden [T, Hd]`. The label itself is always inside. None if nothing was cut.
    """
    given = support_of(micro_batch)
    if given is None:
        return None
    if micro_batch.support_missing is None:
        return given
    assert micro_batch.top_k is not None and micro_batch.top_p is not None  # noqa: PT018 (they come together)
    counts, ids = [], []
    for rows, scaled in _chunks(hidden, head, micro_batch, chunk_tokens, wide):
        missing = micro_batch.support_missing[rows]
        _, inside = given.inside(rows.start, rows.start + len(scaled), scaled.shape[1])
        own = own_cut(
            scaled[missing],
            micro_batch.top_k[rows][missing],
            micro_batch.top_p[rows][missing],
            micro_batch.labels[rows][missing],
        )
        inside[missing] = own
        counts.append(inside.sum(-1))
        ids.append(inside.nonzero()[:, 1].to(torch.int32))
    sizes = torch.cat(counts)
    return TokenSupport(torch.cat(ids), torch.cat((sizes.new_zeros(1), sizes.cumsum(0))))


@torch.no_grad()
def support_differs(
    hidden: torch.Tensor, head: nn.Linear, micro_batch: MicroBatch, chunk_tokens: int, wide: bool
) -> torch.Tensor | None:
    """[T] bool: where the model's own cut would have left something else; None if nothing was cut.

    `hidden [T, Hd]`.
    """
    given = support_of(micro_batch)
    if given is None or micro_batch.top_k is None or micro_batch.top_p is None:
        return None
    parts = [
        differs_from_own_cut(scaled, given, rows.start, micro_batch.top_k[rows], micro_batch.top_p[rows])
        for rows, scaled in _chunks(hidden, head, micro_batch, chunk_tokens, wide)
    ]
    return torch.cat(parts)


def _chunks(
    hidden: torch.Tensor, head: nn.Linear, micro_batch: MicroBatch, chunk_tokens: int, wide: bool
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows and their logits over their temperatures `[n, V]`, one chunk after the other."""
    for start in range(0, hidden.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        temperature = micro_batch.temperature
        yield rows, scaled_logits(hidden, head.weight, head.bias, temperature, rows, float32_products=wide)
