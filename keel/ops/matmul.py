"""Matrix products on the CPU that are not left to one library's taste in processors.

torch's float32 products go to MKL, which on AMD processors runs at less than half of what oneDNN, in the same torch,
does (105 against 235 GFLOP/s on one core of an EPYC with 512-bit units); on Intel's they are alike. oneDNN compiles a
kernel for every shape it meets, though, which takes a millisecond, so it pays only where shapes return: a ragged number
of rows must be filled up to one of a few, `padded_rows`. Products with any other number of rows go to torch as ever.

Which library makes a product depends on its shape, type and device alone, so the same product has the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from keel.ops.numerics import TILE_ROWS, is_exact

MIN_ROWS = 32
"""Below this, a call costs more than its product."""
MIN_COLUMNS = 16
LARGE = 2**22
"""Numbers; more in float32 than the allocator keeps for the next time."""
FEW_ROWS = 192
_STEPS = 8


def padded_rows(num_rows: int) -> int:
    """The smallest regular number of rows not below `num_rows`: multiples of 16, then eight to each doubling.

    Padding is at most an eighth above 128 rows, and a sixteenth on average.
    """
    if num_rows <= 0:
        return 0
    step = max(16, 1 << max(0, (num_rows - 1).bit_length() - _STEPS.bit_length()))
    return -(-num_rows // step) * step


def product(left: torch.Tensor, right: torch.Tensor, *, rows: int, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`left [M, K] @ right [K, N] + bias [N]`, no gradient. `rows`: which of M, K, N is a number of tokens."""
    if _goes_to_onednn(left, rows):
        made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
        return made
    return left @ right if bias is None else torch.addmm(bias, left, right)


def product_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, rows: int) -> None:
    """`product` without a bias, written into `out [M, N]`.

    oneDNN's product cannot be told where to write. A large one is made anew each time, in memory that the system must
    first clear, which takes longer than a product over few rows saves.
    """
    if _goes_to_onednn(left, rows) and not (out.numel() > LARGE and rows < FEW_ROWS):
        out.copy_(product(left, right, rows=rows))
    else:
        torch.mm(left, right, out=out)


def product_in_tiles(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`left [M, K] @ right [K, N] + bias [N]` where a row's bits depend on that row alone; no gradient.

    Every product has `TILE_ROWS` rows, the last filled up with zeros, and at least `MIN_COLUMNS` columns: in a narrower
    one the bits of a row depend on where it lies in memory.
    """
    num_rows, num_columns = left.shape[0], right.shape[1]
    if num_columns < MIN_COLUMNS:
        right = functional.pad(right, (0, MIN_COLUMNS - num_columns))
        bias = None if bias is None else functional.pad(bias, (0, MIN_COLUMNS - num_columns))
    if num_rows % TILE_ROWS:
        left = functional.pad(left, (0, 0, 0, -num_rows % TILE_ROWS))
    parts = [product(tile, right, rows=TILE_ROWS, bias=bias) for tile in left.contiguous().split(TILE_ROWS)]
    if not parts:
        return left.new_zeros(0, num_columns)
    made = parts[0] if len(parts) == 1 else torch.cat(parts)
    return made[:num_rows, :num_columns]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` with `product`: x `[T, in]`, weight `[out, in]`, bias `[out]` -> `[T, out]`.

    Inside `exact_numerics`, with `product_in_tiles`.
    """
    if not is_exact() and not _goes_to_onednn(x, x.shape[0]):
        return functional.linear(x, weight, bias)
    out: torch.Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_HAS_ONEDNN = _has_onednn()


def _goes_to_onednn(tensor: torch.Tensor, rows: int) -> bool:
    return (
        _HAS_ONEDNN
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and rows >= MIN_ROWS
        and rows == padded_rows(rows)
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        if is_exact():
            return product_in_tiles(x, weight.t(), bias)
        return product(x, weight.t(), rows=x.shape[0], bias=bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = x.shape[0]
        return (
            product(grad, weight, rows=rows) if need_x else None,
            product(grad.t(), x, rows=rows) if need_weight else None,
            grad.sum(0) if need_bias else None,
        )
