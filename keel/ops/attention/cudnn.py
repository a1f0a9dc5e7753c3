"""The plain attention of cuDNN, as torch hands it out: whole sequences, causal, grouped heads. It has no window.

Sequences of about one length become one rectangular call, by the buckets of their layout. Rows that fill a bucket up
get a gradient of zero, so that they add nothing to anybody's. Its log-sum-exp is a natural logarithm, [P, H, L, 1]. Its
backward adds up in no fixed order: two passes may differ in the last bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from keel.ops.attention.layout import AttentionBackendError, Layout, Span, build_layout

_forward = torch.ops.aten._scaled_dot_product_cudnn_attention
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward

HEAD_SIZE_MULTIPLE, MAX_HEAD_SIZE = 8, 128


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences of one padded length, `num_pieces` of them."""

    num_pieces: int
    index: torch.Tensor  # [P * L] int64, row of q, k and v; padding repeats a sequence's last row
    real: torch.Tensor  # [R] int64, which of those are no padding
    rows: torch.Tensor  # [R] int64, the rows that they are

    def pieces(self, rows: torch.Tensor) -> torch.Tensor:
        """[T, H, D] -> [P, H, L, D]."""
        return rows.index_select(0, self.index).view(self.num_pieces, -1, *rows.shape[1:]).transpose(1, 2)

    def put(self, pieces: torch.Tensor, rows: torch.Tensor) -> None:
        """The real rows of [P, H, L, ...] into [T, H, ...]."""
        rows.index_copy_(0, self.rows, pieces.transpose(1, 2).flatten(0, 1).index_select(0, self.real))


def refuses_size(size: int) -> str | None:
    """Why cuDNN cannot take heads of `size`, or None."""
    if size % HEAD_SIZE_MULTIPLE or size > MAX_HEAD_SIZE:
        return f"cuDNN takes head sizes that are multiples of {HEAD_SIZE_MULTIPLE} up to {MAX_HEAD_SIZE}, got {size}"
    return None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, H, D], k and v [T, K, D], bfloat16 or float16 -> out [T, H, D] in q's type and lse [T, H] in float32.

    Raises AttentionBackendError for a window and for spans that are not whole sequences.
    """
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))
    for group in _groups_of(layout, q.device):
        heads = (group.pieces(q), group.pieces(k), group.pieces(v))
        piece, piece_lse, *_ = _forward(*heads, None, True, 0.0, True, False, scale=scale)
        group.put(piece, out)
        group.put(piece_lse.squeeze(-1), lse)
    return out, lse


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: Layout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v from the (out, lse) handed in, as the other kernels'."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    for group in _groups_of(layout, q.device):
        padding = torch.ones_like(group.index, dtype=torch.bool).index_fill_(0, group.real, False)
        masked = grad.index_select(0, group.index).masked_fill_(padding[:, None, None], 0.0)
        gradient = masked.unflatten(0, (group.num_pieces, -1)).transpose(1, 2)
        length = gradient.shape[2]
        parts = _backward(
            gradient, group.pieces(q), group.pieces(k), group.pieces(v), group.pieces(out),
            group.pieces(lse.unsqueeze(-1)).contiguous(), no_dropout, no_dropout, None, None, None, length, length,
            0.0, True, scale=scale,
        )  # fmt: skip
        for part, whole in zip(parts, (dq, dk, dv), strict=True):
            group.put(part, whole)
    return dq, dk, dv


def _groups_of(layout: Layout, device: torch.device) -> tuple[Group, ...]:
    if layout.window is not None:
        raise AttentionBackendError("cuDNN's attention has no window; pass backend='auto'")
    whole = all(span.offset == 0 and span.num_queries == span.num_keys for span in layout.spans)
    if not whole or any(span.query_start != span.key_start for span in layout.spans):
        raise AttentionBackendError(
            "cuDNN's attention takes whole sequences, no cache and no ring; pass backend='auto'"
        )
    return _groups(layout.spans, layout.num_query_rows, device)


@lru_cache(maxsize=64)
def _groups(spans: tuple[Span, ...], num_rows: int, device: torch.device) -> tuple[Group, ...]:
    groups = []
    for bucket in build_layout(spans, None, num_rows, num_rows).buckets:
        index = bucket.query_index
        padded = torch.zeros_like(index, dtype=torch.bool) if bucket.padded_queries is None else bucket.padded_queries
        real = (~padded).nonzero().reshape(-1)
        groups.append(Group(bucket.num_pieces, index.to(device), real.to(device), index[real].to(device)))
    return tuple(groups)
