"""Torch's flex attention as a backend: any spans and windows, compiled into one kernel on a CUDA card.

Its log-sum-exp can be differentiated. So instead of handing its backward the (out, lse) that hold the sink, which it
does not take, the backward here says what the sink does to the two: with w = exp(lse - lse') and delta =
rowsum(grad * out'),

    out' = out * w,  lse' = logaddexp(lse, s)   =>   d out = grad * w,   d lse = delta * (1 - w)

which gives the same dq, dk and dv for a sink as for the other parts of a ring. The forward is made again for it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from keel.ops.attention.layout import AttentionBackendError, Layout, Span

SMALLEST_HEAD, LARGEST_HEAD = 16, 256


def refuses_size(size: int) -> str | None:
    """Why the compiled kernel cannot take heads of `size`, or None."""
    if size & (size - 1) or not SMALLEST_HEAD <= size <= LARGEST_HEAD:
        return f"it is used for head sizes that are powers of two from {SMALLEST_HEAD} to {LARGEST_HEAD}, got {size}"
    return None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, H, D], k and v [T', K, D] -> out [T, H, D] in q's type and lse [T, H] in float32 (float64 for float64).

    Raises AttentionBackendError for spans that share keys.
    """
    out, lse = _attend(q.detach(), k.detach(), v.detach(), layout, scale)
    seen = _rows_that_see(layout, q.device)[:, None]
    return out.masked_fill(~seen[..., None], 0.0), lse.masked_fill(~seen, float("-inf"))


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
    """Gradients of q, k and v from the (out, lse) handed in; see the module's text."""
    leaves = (q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_())
    with torch.enable_grad():
        plain_out, plain_lse = _attend(*leaves, layout, scale)
    seen = _rows_that_see(layout, q.device)[:, None]
    weight = torch.exp((plain_lse.detach() - lse).masked_fill(~seen, float("-inf")))  # [T, H]
    delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    toward_lse = (delta * (1 - weight)).masked_fill(~seen, 0.0).to(plain_lse.dtype)
    toward_out = (grad * weight.unsqueeze(-1)).to(plain_out.dtype)
    dq, dk, dv = torch.autograd.grad((plain_out, plain_lse), leaves, (toward_out, toward_lse))
    return dq, dk, dv


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    mask = _block_mask(layout.spans, layout.window, layout.num_query_rows, layout.num_key_rows, q.device)
    heads = [each.transpose(0, 1).unsqueeze(0) for each in (q, k, v)]  # [1, H, T, D]
    grouped = q.shape[1] != k.shape[1]
    out, aux = _kernel()(*heads, block_mask=mask, scale=scale, enable_gqa=grouped, return_aux=AuxRequest(lse=True))
    return out[0].transpose(0, 1), aux.lse[0].transpose(0, 1)


@lru_cache(maxsize=1)
def _kernel() -> Any:
    return torch.compile(flex_attention)


@lru_cache(maxsize=64)
def _places(
    spans: tuple[Span, ...], num_query_rows: int, num_key_rows: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Number of the span and position in it of every query row and key row; -1 and -2 for rows in no span."""
    in_span, at = torch.full((num_query_rows,), -1), torch.zeros(num_query_rows, dtype=torch.int64)
    key_in_span, key_at = torch.full((num_key_rows,), -2), torch.zeros(num_key_rows, dtype=torch.int64)
    for number, span in enumerate(spans):
        rows = slice(span.query_start, span.query_start + span.num_queries)
        keys = slice(span.key_start, span.key_start + span.num_keys)
        if bool((key_in_span[keys] != -2).any()):
            raise AttentionBackendError("flex takes keys of one sequence each; pass backend='auto' or 'blocks'")
        in_span[rows], key_in_span[keys] = number, number
        at[rows] = torch.arange(span.num_queries) + span.offset
        key_at[keys] = torch.arange(span.num_keys)
    return tuple(each.to(device) for each in (in_span, at, key_in_span, key_at))


@lru_cache(maxsize=64)
def _block_mask(
    spans: tuple[Span, ...], window: int | None, num_query_rows: int, num_key_rows: int, device: torch.device
) -> BlockMask:
    in_span, at, key_in_span, key_at = _places(spans, num_query_rows, num_key_rows, device)

    def sees(_batch: torch.Tensor, _head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        distance = at[row] - key_at[key]
        seen = (in_span[row] == key_in_span[key]) & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    return create_block_mask(sees, None, None, num_query_rows, num_key_rows, device=device.type)


def _rows_that_see(layout: Layout, device: torch.device) -> torch.Tensor:
    """[T] bool: which query rows see a key; taken from the layout, which leaves the others out."""
    seen = torch.zeros(layout.num_query_rows, dtype=torch.bool, device=device)
    seen[slice(None) if layout.query_rows is None else layout.query_rows.to(device)] = True
    return seen
