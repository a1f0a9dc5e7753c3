"""A low-rank addition to a product: y = x @ W + scaling * (x @ down.T) @ up (Hu et al. 2021, arXiv 2106.09685).

It is added to the finished product, never merged into W: then `up = 0` leaves every bit of y as it was, a bfloat16 W
does not swallow additions smaller than its own rounding, and no second W is ever made.

A factor of few columns is filled up with zeros: in a product narrower than a vector register the bits of a row depend
on where the row lies in memory (measured with MKL, 75 inputs and 8 columns), and an engine's must not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from keel.ops.matmul import MIN_COLUMNS, linear, product_in_tiles
from keel.ops.numerics import is_exact


@dataclass(frozen=True)
class LowRank:
    """The two factors: `down [r, in]` and `up [r, out]`; of experts `[E, r, in]` and `[E, r, out]`."""

    down: torch.Tensor
    up: torch.Tensor
    scaling: float

    def __getitem__(self, expert: int) -> LowRank:
        """One expert's factors, as views."""
        return LowRank(self.down[expert], self.up[expert], self.scaling)


def low_rank(x: torch.Tensor, factors: LowRank) -> torch.Tensor:
    """`x [.., in]` -> the addition `[.., out]`, with gradients."""
    if is_exact():
        rows = x.reshape(-1, x.shape[-1])
        made = linear(linear(rows, factors.down) * factors.scaling, factors.up.t())
        return made.view(*x.shape[:-1], made.shape[-1])
    rank, width = factors.up.shape
    down, up = _filled_up(factors.down.t()).t(), _filled_up(factors.up)
    small = linear(x, down) if x.dim() == 2 else functional.linear(x, down)
    return ((small[..., :rank] * factors.scaling) @ up)[..., :width]


def add_low_rank_(product: torch.Tensor, x: torch.Tensor, factors: LowRank | None) -> None:
    """Add to `product [n, out]`, in place and without gradient, what the factors make of `x [n, in]`."""
    if factors is not None and is_exact():
        small = product_in_tiles(x, factors.down.t()).mul_(factors.scaling)
        product.add_(product_in_tiles(small, factors.up))
    elif factors is not None:
        small = x @ _filled_up(factors.down.t())
        product.addmm_(small[:, : factors.down.shape[0]], factors.up, alpha=factors.scaling)


def add_low_rank_batched(product: torch.Tensor, x: torch.Tensor, factors: LowRank | None) -> torch.Tensor:
    """`product [E, n, out]` and what the factors of every expert make of `x [E, n, in]`; no gradient."""
    if factors is None:
        return product
    small = torch.bmm(x, _filled_up(factors.down.transpose(1, 2)))
    return torch.baddbmm(product, small[..., : factors.down.shape[1]], factors.up, alpha=factors.scaling)


def _filled_up(right: torch.Tensor) -> torch.Tensor:
    """A product's right factor `[.., in, columns]` with at least `MIN_COLUMNS` columns."""
    missing = MIN_COLUMNS - right.shape[-1]
    return functional.pad(right, (0, missing)) if missing > 0 else right


def low_rank_grads(
    x: torch.Tensor, grad: torch.Tensor, small_grad: torch.Tensor, factors: LowRank
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `down [r, in]` and `up [r, out]` from that of the product; `small_grad` as `grad_of_small` gives."""
    return small_grad.t() @ x, (x @ factors.down.t()).mul_(factors.scaling).t() @ grad


def grad_of_small(grad: torch.Tensor, factors: LowRank) -> torch.Tensor:
    """Gradient `[n, r]` of x @ down.T from that of the product, `grad [n, out]`; times `down` it is the input's."""
    return (grad @ factors.up.t()).mul_(factors.scaling)
