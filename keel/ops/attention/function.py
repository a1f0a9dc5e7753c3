"""Sink attention: one autograd function above a table of backends.

    forward     (out, lse) from a plain backend; (out', lse') by `apply_sinks`
    backward    the backend's own backward, handed (out', lse') instead of (out, lse), gives exact dq, dk and dv,
                because the sink has no value vector: P = exp(S - lse') and delta = rowsum(grad * out') are then the
                true ones. ds comes from `sinks_gradient`.

Letting the gradient of a plain `out * sigmoid(lse - s)` go through a kernel whose lse is not differentiable instead
leaves dv and ds right and dq and dk silently wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from keel.ops.attention import blocks, cpu, cuda
from keel.ops.attention.layout import AttentionBackendError, Layout, packed_layout
from keel.ops.attention.reference import dense_attention
from keel.ops.attention.sinks import sink_factor, sinks_gradient

FULL = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)
DTYPES = (*FULL, *HALF)


class PlainForward(Protocol):
    """Attention without sinks: (q, k, v, layout, scale) -> (out [T, H, D], lse [T, H]); nothing seen is (0, -inf)."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class PlainBackward(Protocol):
    """Its gradients (dq, dk, dv), computed from the `out` and `lse` it is handed, not from its own."""

    def __call__(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        layout: Layout,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True, slots=True)
class Backend:
    """A kernel pair, and the types of device and element it takes; a backend never hears of sinks."""

    name: str
    device_types: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    forward: PlainForward
    backward: PlainBackward
    reason: str


BACKENDS: dict[str, Backend] = {
    "cpu": Backend(
        "cpu", ("cpu",), (*FULL, torch.bfloat16), cpu.forward, cpu.backward, "torch's stock CPU flash kernel"
    ),
    "cuda": Backend("cuda", ("cuda",), HALF, cuda.forward, cuda.backward, "torch's stock CUDA flash kernels"),
    "blocks": Backend(
        "blocks",
        ("cpu", "cuda"),
        FULL,
        blocks.forward,
        blocks.backward,
        "plain products by blocks of rows: the CUDA flash kernels take bfloat16 and float16 only",
    ),
}
REFERENCE = "reference"
"""The name of the dense float64 twin; it is not a kernel pair and runs on any device."""


def choose_backend(name: str | Backend, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend called `name` (or `name` itself, if it is one), or with "auto" the first that takes the tensors.

    Raises AttentionBackendError if there is none, or if it does not take tensors of `dtype` on `device`.
    """
    if name == "auto":
        for backend in BACKENDS.values():
            if device.type in backend.device_types and dtype in backend.dtypes:
                return backend
        available = ", ".join(f"{backend.name!r} ({_takes(backend)})" for backend in BACKENDS.values())
        raise AttentionBackendError(
            f"sink attention has no backend for tensors on {device} of {dtype}; available: {available}, {REFERENCE!r} "
            f"(anywhere, quadratic). Move or cast the model, or pass backend={REFERENCE!r}"
        )
    if isinstance(name, str) and name not in BACKENDS:
        known = ", ".join(repr(known) for known in ("auto", *BACKENDS, REFERENCE))
        raise AttentionBackendError(f"unknown attention backend {name!r}; known: {known}")
    backend = BACKENDS[name] if isinstance(name, str) else name
    if device.type not in backend.device_types or dtype not in backend.dtypes:
        raise AttentionBackendError(
            f"attention backend {backend.name!r} takes {_takes(backend)}, the tensors are {dtype} on {device}; "
            "use 'auto'"
        )
    return backend


def _takes(backend: Backend) -> str:
    types = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
    return f"{types} on {' or '.join(backend.device_types)}"


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
    chosen = choose_backend(backend, q.device, q.dtype)
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
