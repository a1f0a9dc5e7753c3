"""Rows taken several times, with a backward pass that adds their gradients up in float32 at least."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from keel.ops.numerics import deterministic_algorithms


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        sums = grad.new_zeros((ctx.num_rows, *grad.shape[1:]), dtype=wide)
        # A CUDA card adds in an order left to chance unless it is told otherwise.
        with deterministic_algorithms(grad.device.type == "cuda"):
            sums.index_add_(0, index, grad.to(wide))
        return sums.to(grad.dtype), None


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`rows [U, ...]` at `index [T]` -> `[T, ...]`; a row that is taken often gets the sum of the gradients.

    torch's own `index_select` promises neither the width of that sum nor, on CUDA, its order.
    """
    out: torch.Tensor = _GatherRows.apply(rows, index)  # type: ignore[no-untyped-call]
    return out
