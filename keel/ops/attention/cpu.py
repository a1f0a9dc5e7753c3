"""The plain attention of torch's stock CPU flash kernel, forward and backward. It has never heard of sinks.

The kernel shares key heads between grouped query heads by itself (H a multiple of K), so nothing is repeated. Its
log-sum-exp is a natural logarithm. It returns (0, 0) for a row without a visible key; no such row ever reaches it,
because `layout` leaves those rows out and they come out as (0, -inf), the neutral element of sinks and merges.
"""

from __future__ import annotations

import torch

from keel.ops.attention.layout import Bucket, Layout

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

ALIGNMENT = 64
"""Bytes: where torch's allocator lets a tensor begin."""


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, H, D], k and v [T', K, D] -> out [T, H, D] in q's type and lse [T, H] in float32 (float64 for float64)."""
    outs, lses = [], []
    for bucket in layout.buckets:
        query, key, value = _queries(q, bucket), _keys(k, bucket), _keys(v, bucket)
        out, lse = _forward(query, key, value, 0.0, bucket.causal, attn_mask=bucket.mask(q.dtype), scale=scale)
        outs.append(out.transpose(1, 2).reshape(-1, *q.shape[1:]))
        lses.append(lse.transpose(1, 2).reshape(-1, q.shape[1]))
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if not outs:
        return torch.zeros_like(q), q.new_full(q.shape[:2], float("-inf"), dtype=lse_dtype)
    return _rows(outs, layout, 0.0), _rows(lses, layout, float("-inf"))


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
    """Gradients of q, k and v for the gradient of `out`.

    The kernel recomputes P = exp(S - lse) and takes delta = rowsum(grad * out). Handed the (out, lse) of a softmax
    with a larger denominator (a sink, the other parts of a ring) it gives that softmax's exact gradients.

    Where query heads share a key head, the kernel adds their gradients up in the keys' own type: in bfloat16 with three
    times the error. So in short types it is given a key head per query head, and they are added up in float32 here.
    """
    group = 1 if q.dtype.itemsize > 2 else q.shape[1] // k.shape[1]
    grads_q, grads_k, grads_v = [], [], []
    for bucket in layout.buckets:
        bucket_lse = lse.index_select(0, bucket.query_index)
        if bucket.padded_queries is not None:
            # P = exp(S - inf) = 0: a padding row gives nothing to any gradient, whatever it repeats.
            bucket_lse.masked_fill_(bucket.padded_queries[:, None], float("inf"))
        dq, dk, dv = _backward(
            _queries(grad, bucket),
            _queries(q, bucket),
            _repeated(_keys(k, bucket), group),
            _repeated(_keys(v, bucket), group),
            _queries(out, bucket),
            bucket_lse.view(bucket.num_pieces, -1, lse.shape[1]).transpose(1, 2),
            0.0,
            bucket.causal,
            attn_mask=bucket.mask(q.dtype),
            scale=scale,
        )
        grads_q.append(dq.transpose(1, 2).reshape(-1, *q.shape[1:]))
        grads_k.append(_added_up(dk, group).transpose(1, 2).reshape(-1, *k.shape[1:]))
        grads_v.append(_added_up(dv, group).transpose(1, 2).reshape(-1, *v.shape[1:]))
    if not grads_q:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    return _rows(grads_q, layout, 0.0), _key_rows(grads_k, layout).to(k.dtype), _key_rows(grads_v, layout).to(v.dtype)


def _repeated(heads: torch.Tensor, group: int) -> torch.Tensor:
    return heads if group == 1 else heads.repeat_interleave(group, 1)


def _added_up(gradient: torch.Tensor, group: int) -> torch.Tensor:
    """[P, H, M, D] of query heads -> [P, K, M, D] in float32, of the key heads that `group` of them share."""
    return gradient if group == 1 else gradient.unflatten(1, (-1, group)).sum(2, dtype=torch.float32)


def _queries(rows: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    return _pieces(rows, bucket.query_index, bucket.query_run, bucket.num_pieces)


def _keys(rows: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    return _pieces(rows, bucket.key_index, bucket.key_run, bucket.num_pieces)


def _pieces(rows: torch.Tensor, index: torch.Tensor, run: slice | None, num_pieces: int) -> torch.Tensor:
    """[T, H, D] -> [P, H, L, D]: a view of the gathered rows, or of the very rows where nothing need be gathered.

    The kernel's bits follow where in memory a row begins, so only rows that begin where gathered ones would are used
    as they are.
    """
    taken = rows.index_select(0, index) if run is None else rows[run].contiguous()
    if taken.data_ptr() % ALIGNMENT:
        taken = taken.clone()
    return taken.view(num_pieces, -1, *rows.shape[1:]).transpose(1, 2)


def _rows(parts: list[torch.Tensor], layout: Layout, missing: float) -> torch.Tensor:
    """The buckets' rows back in the order of q; rows in no bucket are `missing`."""
    joined = _joined(parts)
    if layout.queries_in_order:
        return joined
    found = joined.index_select(0, layout.query_slots)
    if layout.query_rows is None:
        return found
    rows = found.new_full((layout.num_query_rows, *found.shape[1:]), missing)
    return rows.index_copy_(0, layout.query_rows, found)


def _key_rows(parts: list[torch.Tensor], layout: Layout) -> torch.Tensor:
    """Gradients of keys back in the order of k, summed (in float32 at least) where bands overlap."""
    joined = _joined(parts)
    if layout.keys_in_order:
        return joined
    if layout.key_slots is not None:
        return joined.index_select(0, layout.key_slots)
    index = torch.cat([bucket.key_index for bucket in layout.buckets])
    sums = joined.new_zeros(
        (layout.num_key_rows, *joined.shape[1:]), dtype=torch.promote_types(joined.dtype, torch.float32)
    )
    # Padding repeats a row's index, but its gradient is exactly zero.
    return sums.index_add_(0, index, joined.to(sums.dtype)).to(joined.dtype)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
