"""Root-mean-square normalization as one autograd step (Zhang and Sennrich 2019, arXiv:1910.07467).

    r = 1 / sqrt(mean(x^2) + eps)        y = w * x * r

    with u = grad * w and h = x * r:     dx = r * (u - h * mean(u * h))        dw = sum over rows of grad * h

Written out step by step, autograd's backward of the same formula costs three times as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension: x `[.., Hd]`, weight `[Hd]` -> `[.., Hd]`.

    x and weight share float32 or float64; a row's bits depend on that row alone. Raises ValueError otherwise.
    """
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.float64) or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm: got x {x.dtype} {tuple(x.shape)}, weight {weight.dtype} {tuple(weight.shape)}; "
            "needs float32 or float64 for both, and a weight as wide as x"
        )
    normed: torch.Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The slow twin: the formula in float64, torch's own autograd."""
    wide = x.double()
    return weight.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        square_sum: torch.Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_()
        scale = square_sum.mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()  # r [T, 1]
        normed = rows * scale  # h
        ctx.save_for_backward(normed, scale, weight)
        scaled: torch.Tensor = normed * weight
        return scaled.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        rows = grad.reshape(normed.shape)
        product = rows * normed
        grad_weight = product.sum(0)
        mean = torch.mv(product, weight).mul_(1.0 / normed.shape[1])
        grad_x = (rows * weight).addcmul_(normed, mean[:, None], value=-1.0).mul_(scale)
        return grad_x.view(grad.shape), grad_weight, None
