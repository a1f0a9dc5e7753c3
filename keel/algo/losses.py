"""Policy losses: `(LossInputs, *, options) -> (loss per token [T], metrics)`.

A loss neither masks nor averages: `keel.algo.reduce` does, once, with the denominator of the whole batch. Metrics are
per-token tensors (averaged over loss tokens by the learner). Rows that are not loss tokens hold arbitrary values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["cross_entropy", "ppo_clip", "reinforce"]

Metrics = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LossInputs:
    """What a loss may look at, all about the T labels of a micro-batch.

    `logprobs` has the gradient; nothing else has. With one update per batch `old_logprobs` is `logprobs.detach()`.
    """

    logprobs: torch.Tensor  # [T]
    old_logprobs: torch.Tensor  # [T]
    loss_mask: torch.Tensor  # [T] bool
    advantages: torch.Tensor | None = None  # [T]; absent in supervised learning

    @property
    def ratio(self) -> torch.Tensor:
        """[T] `exp(logprobs - old_logprobs)`: exactly 1 where they are equal, whatever the gradient."""
        return torch.exp(self.logprobs - self.old_logprobs)

    def required_advantages(self) -> torch.Tensor:
        """`advantages`, or ValueError if the batch has none."""
        if self.advantages is None:
            raise ValueError(
                "this loss needs advantages, the batch has none: call add_advantages on it before backward"
            )
        return self.advantages


def ppo_clip(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.2
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))` with `r = exp(logprobs - old_logprobs)`.

    PPO (Schulman et al. 2017, arXiv 1707.06347, equation 7) with separate bounds ("clip-higher", DAPO: Yu et al. 2025,
    arXiv 2503.14476, equation 8). The upper bound stops tokens of positive advantage from growing more likely, the
    lower one tokens of negative advantage from growing less likely; a step back towards the old policy is never
    stopped. `clip_fraction` counts tokens whose gradient is cut.
    """
    advantages = inputs.required_advantages()
    ratio = inputs.ratio
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return torch.maximum(free, clipped), {"clip_fraction": (clipped > free).detach().float()}


def reinforce(inputs: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`-A log pi`, the score-function estimator (Williams 1992, "Simple statistical gradient-following algorithms").

    On-policy: `old_logprobs` do not enter, so several updates per batch are biased unless a correction weighs them.
    """
    return -inputs.required_advantages() * inputs.logprobs, {}


def cross_entropy(inputs: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`-log pi`, the likelihood of demonstrations (supervised warm start)."""
    return -inputs.logprobs, {}
