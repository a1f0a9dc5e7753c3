"""From per-token values to one number: the only place where masks, weights and denominators are applied.

The denominator is that of the whole update, over all micro-batches and ranks. Each micro-batch contributes a sum over
it, so that gradients of any split of the same tokens add up to the same total.
"""

from __future__ import annotations

import torch

__all__ = ["masked_max", "masked_sum", "reduce_loss"]


def masked_sum(values: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of `values [T]` (times `weights [T]`) where `mask [T]`, added up in float64.

    Rows outside the mask are replaced, not multiplied by zero: an infinity there does not make the sum a NaN.
    """
    weighted = values if weights is None else values * weights
    return torch.where(mask, weighted, torch.zeros_like(weighted)).sum(dtype=torch.float64)


def masked_max(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Largest of non-negative `values [T]` where `mask [T]`, float64, 0 if there is none; a NaN counts as infinite."""
    kept = torch.where(mask, values, torch.zeros_like(values)).double()
    kept = torch.nan_to_num(kept, nan=torch.inf, posinf=torch.inf)
    return kept.amax() if kept.numel() else kept.new_zeros(())


def reduce_loss(
    per_token: torch.Tensor, mask: torch.Tensor, denominator: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """A micro-batch's share of the batch's mean loss: `sum(mask * weights * per_token) / denominator`, float64 scalar.

    Raises ValueError for a denominator that is not positive: an empty update has no loss.
    """
    if denominator <= 0:
        raise ValueError(f"reduce_loss: denominator is {denominator}; an update without loss tokens has no loss")
    return masked_sum(per_token, mask, weights) / denominator
