"""What a correction sees and what it says, and how several make one; the names r, R and d are those of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])
BoundCorrection = tuple[Callable[..., "Correction"], Mapping[str, Any]]
"""A correction and its options."""
Average = Literal["product", "geometric"]


@dataclass(frozen=True)
class CorrectionInputs:
    """About T labels: of a micro-batch for a token-local correction, of the whole batch for any other.

    No gradient flows through any of it. `loss_mask` and `weights` are what earlier corrections left.
    """

    old_logprobs: torch.Tensor  # [T], learner before the first update on this batch
    rollout_logprobs: torch.Tensor  # [T], engine, when drawn
    loss_mask: torch.Tensor  # [T] bool
    trajectory: torch.Tensor | None = None  # [T] int64, whose token it is
    weights: torch.Tensor | None = None  # [T], None: all are 1

    @property
    def log_ratio(self) -> torch.Tensor:
        """[T] `d`, 0 outside the loss mask."""
        difference = self.old_logprobs - self.rollout_logprobs
        return torch.where(self.loss_mask, difference, torch.zeros_like(difference))

    def per_trajectory(self, values: torch.Tensor, reduce: Literal["sum", "mean", "max"]) -> torch.Tensor:
        """`values [T]` of each trajectory's loss tokens as one number, at every row of it `[T]`; 0 if it has none."""
        if self.trajectory is None:
            raise ValueError("this correction compares a trajectory's tokens; it needs the whole batch scored")
        if not self.trajectory.numel():
            return values
        count = int(self.trajectory.max()) + 1
        rows = self.trajectory[self.loss_mask]
        kept = values[self.loss_mask]
        found = values.new_zeros(count)
        if reduce == "max":
            found = found.scatter_reduce(0, rows, kept, "amax", include_self=False)
        else:
            found = found.index_add(0, rows, kept)
            if reduce == "mean":
                found = found / values.new_zeros(count).index_add(0, rows, torch.ones_like(kept)).clamp(min=1)
        return found[self.trajectory]


@dataclass(frozen=True)
class Correction:
    """`weights` [T] multiply the policy loss (None: all 1); tokens not in `keep` [T] are left out (None: all stay).

    Metrics are per token [T]; what is reported is their mean over the batch's loss tokens.
    """

    weights: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    keep: torch.Tensor | None = None


def token_local(function: AnyFunction) -> AnyFunction:
    """Mark a correction that rejects nothing and whose weight of a token depends on that token alone."""
    vars(function)["token_local"] = True
    return function


def is_token_local(function: Callable[..., Any]) -> bool:
    """A correction says so itself; unmarked ones are taken to need the whole batch."""
    return bool(getattr(function, "token_local", False))


def compose(corrections: Sequence[BoundCorrection], inputs: CorrectionInputs) -> Correction:
    """One after the other: weights multiply, what one rejects the next does not see.

    Metrics are 0 at tokens that were rejected before; of a name that several have, the last one's are kept, but what
    left on account of any is added up.
    """
    weights, keep, metrics = inputs.weights, None, dict[str, torch.Tensor]()
    for correction, options in corrections:
        result = correction(replace(inputs, weights=weights), **options)
        if result.weights is not None:
            weights = result.weights if weights is None else weights * result.weights
        if result.keep is not None:
            keep = result.keep if keep is None else keep & result.keep
        shown = inputs.loss_mask
        for name, values in result.metrics.items():
            seen = torch.where(shown, values, torch.zeros_like(values))
            metrics[name] = metrics[name] + seen if name == "masked_share" and name in metrics else seen
        if result.keep is not None:
            inputs = replace(inputs, loss_mask=shown & result.keep)
    return Correction(weights, metrics, keep)
