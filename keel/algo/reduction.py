"""How per-token losses become one number: what each loss token weighs, and what the sum is divided by.

`(tokens [N], *, options) -> Reduction`, from the number of loss tokens of each of an update's N trajectories (0:
nothing of it is left). All three agree when all trajectories have the same length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["constant_length", "sequence_mean", "token_mean"]


@dataclass(frozen=True)
class Reduction:
    """`weights` [N] multiply the tokens of each trajectory (None: all 1); their sum is divided by `denominator`."""

    weights: torch.Tensor | None
    denominator: float


def token_mean(tokens: torch.Tensor) -> Reduction:
    """Every token weighs the same: a long trajectory counts more than a short one.

    DAPO's token-level loss (Yu et al. 2025, arXiv 2503.14476, section 3.3).
    """
    return Reduction(None, float(tokens.sum()))


def sequence_mean(tokens: torch.Tensor) -> Reduction:
    """Every trajectory weighs the same: a token of a long one counts less.

    GRPO (Shao et al. 2024, arXiv 2402.03300, equation 3). Long failures are punished less per token than short ones,
    the length bias that "Dr. GRPO" (below) is about.
    """
    return Reduction(1.0 / tokens.clamp(min=1).double(), float((tokens > 0).sum()))


def constant_length(tokens: torch.Tensor, *, length: int) -> Reduction:
    """The sum over tokens, divided by trajectories times `length`: no term depends on how long an attempt was.

    "Dr. GRPO" (Liu et al. 2025, arXiv 2503.20783, appendix A), whose `length` is the generation budget. The only one of
    the three whose gradient is unbiased when lengths are random. Raises ValueError for a length below 1.
    """
    if length < 1:
        raise ValueError(f"constant_length: got length={length}; it is a number of tokens, say rollout.max_new_tokens")
    return Reduction(None, float((tokens > 0).sum()) * length)
