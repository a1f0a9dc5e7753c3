"""The kernels of the packages flash-attn 2, 3 and 4, as they are installed: nothing in them is changed or replaced.

Versions 2 and 3 hand out a plain forward and backward; neither's backward knows a sink, and neither lets a gradient
through its log-sum-exp, so they are used as any other kernel pair: the backward is handed the (out, lse) that are true
with the sinks. Version 4 has a sink of its own, forward and backward, and is the check on that: `own_sinks`.

Functions are looked up when first used. Their signatures: flash_attn/flash_attn_interface.py,
hopper/flash_attn_interface.py and flash_attn/cute/interface.py of Dao-AILab/flash-attention.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch

from keel.ops.attention.cuda import Sequences, sequences
from keel.ops.attention.layout import AttentionBackendError, Layout

MODULE_2 = "flash_attn.flash_attn_interface"
MODULE_3 = "flash_attn_interface"
MODULE_4 = "flash_attn.cute"
HOPPER = (9, 0)


@lru_cache(maxsize=8)
def _function(module: str, name: str) -> Any:
    """A function of an installed package. Raises AttentionBackendError if it is not there."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise AttentionBackendError(
            f"{module}.{name} cannot be had: {error}; install the package, or use 'auto'"
        ) from error


def needs_hopper(device: torch.device) -> str | None:
    """Why the kernels of flash-attn 3 cannot run on a CUDA device, or None."""
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= HOPPER else f"its kernels need compute capability 9.0, this card has {capability}"


def forward_2(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, found: Sequences, left: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward of flash-attn 2, as `cuda.KernelForward` says."""
    out, lse, *_ = _function(MODULE_2, "_flash_attn_varlen_forward")(
        q, k, v, *found.lengths, 0.0, scale, True, window_size_left=left, window_size_right=0
    )
    return out, lse


def backward_2(  # noqa: PLR0917 - see KernelBackward
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    found: Sequences,
    left: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward of flash-attn 2, as `cuda.KernelBackward` says; sums are made in a fixed order."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _function(MODULE_2, "_flash_attn_varlen_backward")(
        grad, q, k, v, out, lse, dq, dk, dv, *found.lengths, 0.0, scale, True,
        window_size_left=left, window_size_right=0, softcap=0.0, alibi_slopes=None, deterministic=True,
    )  # fmt: skip
    return dq, dk, dv


def forward_3(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, found: Sequences, left: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward of flash-attn 3, as `cuda.KernelForward` says."""
    out, lse, *_ = _function(MODULE_3, "_flash_attn_forward")(
        q, k, v, **_named_lengths(found), softmax_scale=scale, causal=True, window_size_left=left, window_size_right=0
    )
    return out, lse


def backward_3(  # noqa: PLR0917 - see KernelBackward
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    found: Sequences,
    left: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The backward of flash-attn 3, as `cuda.KernelBackward` says; sums are made in a fixed order."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _function(MODULE_3, "_flash_attn_backward")(
        grad, q, k, v, out, lse, **_named_lengths(found), dq=dq, dk=dk, dv=dv, softmax_scale=scale, is_causal=True,
        window_size_left=left, window_size_right=0, deterministic=True,
    )  # fmt: skip
    return dq, dk, dv


def own_sinks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, layout: Layout, scale: float
) -> torch.Tensor:
    """Attention with sinks by flash-attn 4, differentiated by its own backward: q [T, H, D] -> out [T, H, D].

    Raises AttentionBackendError if the package is not installed, and for spans that leave rows of q or k out.
    """
    attend = _function(MODULE_4, "flash_attn_varlen_func")
    found = sequences(layout.spans, layout.num_query_rows, layout.num_key_rows, q.device)
    if found is None or found.query_rows is not None or found.key_rows is not None:
        raise AttentionBackendError("flash-attn 4 is a check on whole packed sequences; use 'auto' for other spans")
    window = (None if layout.window is None else layout.window - 1, 0)
    given = {"softmax_scale": scale, "causal": True, "window_size": window, "deterministic": True}
    result = attend(q, k, v, **_named_lengths(found), learnable_sink=sinks, **given)
    out: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return out


def _named_lengths(found: Sequences) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, found.lengths, strict=True))
