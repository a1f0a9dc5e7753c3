"""A low-rank addition to a product: y = x @ W + scaling * (x @ down.T) @ up (Hu et al. 2021, arXiv 2106.09685).

It is added to the finished product, never merged into W: then `up = 0` leaves every bit of y as it was, a bfloat16 W
does not swallow additions smaller than its own rounding, and no second W is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from keel.ops.matmul import linear


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
    small = linear(x, factors.down) if x.dim() == 2 else functional.linear(x, factors.down)
    return (small * factors.scaling) @ factors.up


def add_low_rank_(product: torch.Tensor, x: torch.Tensor, factors: LowRank | None) -> None:
    """Add to `product [n, out]`, in place and without gradient, what the factors make of `x [n, in]`."""
    if factors is not None:
        product.addmm_(x @ factors.down.t(), factors.up, alpha=factors.scaling)


def add_low_rank_batched(product: torch.Tensor, x: torch.Tensor, factors: LowRank | None) -> torch.Tensor:
    """`product [E, n, out]` and what the factors of every expert make of `x [E, n, in]`; no gradient."""
    if factors is None:
        return product
    small = torch.bmm(x, factors.down.transpose(1, 2))
    return torch.baddbmm(product, small, factors.up, alpha=factors.scaling)


def low_rank_grads(
    x: torch.Tensor, grad: torch.Tensor, small_grad: torch.Tensor, factors: LowRank
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `down [r, in]` and `up [r, out]` from that of the product; `small_grad` as `grad_of_small` gives."""
    return small_grad.t() @ x, (x @ factors.down.t()).mul_(factors.scaling).t() @ grad


def grad_of_small(grad: torch.Tensor, factors: LowRank) -> torch.Tensor:
    """Gradient `[n, r]` of x @ down.T from that of the product, `grad [n, out]`; times `down` it is the input's."""
    return (grad @ factors.up.t()).mul_(factors.scaling)
