"""Rollout correction: importance weights for tokens drawn by something that is not quite the learner's policy.

`(CorrectionInputs, *, options) -> Correction`. The engine's kernels, its precision and its staleness make
`rollout_logprobs` differ from `old_logprobs`; the weights made of the difference multiply the per-token policy loss
and never enter the PPO ratio. A correction marked `token_local` looks at each token alone, so that with one update per
batch it is made inside the loss from the detached log-probs; any other needs the whole batch scored first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

__all__ = ["none", "token_truncated"]

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


@dataclass(frozen=True)
class CorrectionInputs:
    """About the T labels of a micro-batch; no gradient flows through any of it."""

    old_logprobs: torch.Tensor  # [T], learner before the first update on this batch
    rollout_logprobs: torch.Tensor  # [T], engine, when drawn
    loss_mask: torch.Tensor  # [T] bool


@dataclass(frozen=True)
class Correction:
    """`weights` [T] multiply the policy loss; None: all are 1. Metrics are per token [T]; their mean is reported."""

    weights: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


def token_local(function: AnyFunction) -> AnyFunction:
    """Mark a correction whose value at a token depends on that token alone."""
    vars(function)["token_local"] = True
    return function


def is_token_local(function: Callable[..., Any]) -> bool:
    """A correction says so itself; unmarked ones are taken to need the whole batch."""
    return bool(getattr(function, "token_local", False))


@token_local
def none(inputs: CorrectionInputs) -> Correction:  # noqa: ARG001
    """No correction: tokens count as if the learner had drawn them."""
    return Correction()


@token_local
def token_truncated(inputs: CorrectionInputs, *, cap: float = 2.0) -> Correction:
    """`min(exp(old_logprobs - rollout_logprobs), cap)`: token-level truncated importance sampling (TIS).

    Truncation: Ionides 2008, "Truncated Importance Sampling"; for rollout mismatch: Yao et al. 2025, "Your Efficient
    RL Framework Secretly Brings You Off-Policy RL Training". The bound is above only: a token the learner finds much
    more likely than the engine did counts at most `cap` times, one it finds less likely counts less, down to 0.
    `truncated_share` is the share of loss tokens at the cap. Raises ValueError if `cap` is not positive.
    """
    if cap <= 0:
        raise ValueError(f"token_truncated: got cap={cap}; it must be positive (2.0 is usual)")
    raw = torch.exp(inputs.old_logprobs - inputs.rollout_logprobs)
    weights = raw.clamp(max=cap)
    return Correction(weights, {"weight_mean": weights, "truncated_share": (raw > cap).float()})
