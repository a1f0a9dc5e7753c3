"""Sink attention: one autograd function above a table of backends.

    forward     (out, lse) from a plain backend; (out', lse') by `apply_sinks`
    backward    the backend's own backward, handed (out', lse') instead of (out, lse), gives exact dq, dk and dv,
                because the sink has no value vector: P = exp(S - lse') and delta = rowsum(grad * out') are then the
                true ones. ds comes from `sinks_gradient`.

Letting the gradient of a plain `out * sigmoid(lse - s)` go through a kernel whose lse is not differentiable instead
leaves dv and ds right and dq and dk silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from keel.ops.attention.backends import DTYPES, OWN_SINKS, REFERENCE, Backend, choose_backend
from keel.ops.attention.flash_packages import own_sinks
from keel.ops.attention.layout import Layout, packed_layout
from keel.ops.attention.reference import dense_attention
from keel.ops.attention.sinks import sink_factor, sinks_gradient


class SinkBackward(torch.autograd.Function):
    """The backward pass: the stock kernel's own, handed the (out, lse) that are true with the sinks. A subclass has a
    forward pass that keeps them."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        dq, dk, dv = ctx.backend.backward(grad, q, k, v, out, lse, ctx.layout, ctx.scale)
        ds = None if sinks is None else sinks_gradient(grad, out, lse, sinks)
        return dq, dk, dv, ds, None, None, None


class _SinkAttention(SinkBackward):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        layout: Layout,
        scale: float,
        backend: Backend,
    ) -> torch.Tensor:
        out, lse = backend.forward(q, k, v, layout, scale)
        if sinks is not None:
            factor, lse = sink_factor(lse, sinks)
            out.mul_(factor)  # a backend's out is its own, so no second one is made
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.layout, ctx.scale, ctx.backend = layout, scale, backend
        return out


def sink_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    backend: str | Backend = "auto",
) -> torch.Tensor:
    """Causal attention over packed sequences, with a learned sink per head; differentiable in q, k, v and sinks.

    q [T, H, D]; k, v [T, K, D] with H a multiple of K; sinks [H] of any float type, or None; `cu_seqlens` [S + 1]
    integers, the row where each sequence starts, and T; `window` W lets row i see rows j with 0 <= i - j < W.
    Returns out [T, H, D] in q's type. Same inputs, same bits, with and without gradient; a sequence's values do not
    depend on the others. Raises ValueError on shapes or types that do not fit, AttentionBackendError if no backend can.
    """
    layout = packed_layout(cu_seqlens, window)
    if layout.max_queries > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but cu_seqlens has a sequence of {layout.max_queries} rows")
    return layout_attention(q, k, v, sinks, layout=layout, scale=scale, backend=backend)


def layout_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    layout: Layout,
    scale: float,
    backend: str | Backend = "auto",
) -> torch.Tensor:
    """`sink_attention` over any spans, where k and v may have other rows than q (a cache, padding left out).

    Rows of q that see no key, in a span or in none, are zero.
    """
    _check(q, k, v, layout)
    if backend == REFERENCE:
        return dense_attention(q, k, v, sinks, layout, scale)[0].to(q.dtype)
    if backend == OWN_SINKS:
        return own_sinks(q, k, v, sinks, layout, scale)
    chosen = choose_backend(backend, q.device, q.dtype, q.shape[2])
    out: torch.Tensor = _SinkAttention.apply(q, k, v, sinks, layout, scale, chosen)  # type: ignore[no-untyped-call]
    return out


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention needs q [T, H, D] and k, v [T', K, D], H a multiple of K; got q {list(q.shape)}, "
            f"k {list(k.shape)}, v {list(v.shape)}"
        )
    if q.shape[0] != layout.num_query_rows or k.shape[0] != layout.num_key_rows:
        raise ValueError(
            f"the layout is for {layout.num_query_rows} query and {layout.num_key_rows} key rows, got {q.shape[0]} and "
            f"{k.shape[0]}; the last of cu_seqlens must be T"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v must share one of {DTYPES}, got {q.dtype}, {k.dtype}, {v.dtype}; cast them first")
