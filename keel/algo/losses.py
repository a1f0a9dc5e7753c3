"""Policy losses: `(LossInputs, *, options) -> (loss per token [T], metrics)`.

A loss neither masks nor averages: `keel.algo.reduce` does, once, with the denominator of the whole batch. Metrics are
per-token tensors (averaged over loss tokens by the learner). Rows that are not loss tokens hold arbitrary values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["cispo", "cross_entropy", "gspo", "ppo_clip", "reinforce"]

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
    rollout_logprobs: torch.Tensor | None = None  # [T], engine, when drawn; absent if nothing was
    sequence: torch.Tensor | None = None  # [T] int64, the sequence each row belongs to

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

    def sequence_mean(self, values: torch.Tensor) -> torch.Tensor:
        """[T] the mean of `values [T]` over the loss tokens of a row's sequence, differentiable; 0 if it has none."""
        if self.sequence is None:
            raise ValueError("this loss compares the tokens of a sequence; LossInputs.sequence is missing")
        count = int(self.sequence.max()) + 1 if self.sequence.numel() else 0
        kept = torch.where(self.loss_mask, values, torch.zeros_like(values))
        sums = values.new_zeros(count).index_add(0, self.sequence, kept)
        sizes = values.new_zeros(count).index_add(0, self.sequence, self.loss_mask.to(values.dtype))
        return (sums / sizes.clamp(min=1))[self.sequence]


def ppo_clip(
    inputs: LossInputs, *, clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))` with `r = exp(logprobs - old_logprobs)`.

    PPO (Schulman et al. 2017, arXiv 1707.06347, equation 7) with separate bounds ("clip-higher", DAPO: Yu et al. 2025,
    arXiv 2503.14476, equation 8). The upper bound stops tokens of positive advantage from growing more likely, the
    lower one tokens of negative advantage from growing less likely; a step back towards the old policy is never
    stopped. With `dual_clip = c > 1` a token of negative advantage costs at most `-A c`, so that one which has become
    far more likely does not dominate (dual-clip PPO: Ye et al. 2020, arXiv 1912.09729, equation 5); 0 is off.
    `clip_fraction` counts tokens whose gradient is cut. Raises ValueError for a `dual_clip` between 0 and 1.
    """
    if dual_clip and dual_clip <= 1.0:
        raise ValueError(f"ppo_clip: got dual_clip={dual_clip}; it is 0 (off) or above 1 (3.0 is usual)")
    return _clipped(inputs.required_advantages(), inputs.ratio, clip_low, clip_high, dual_clip)


def gspo(
    inputs: LossInputs, *, clip_low: float = 3e-4, clip_high: float = 4e-4
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clip on the ratio of whole sequences, `s = exp(mean over its tokens of logprobs - old_logprobs)`.

    Every token of a sequence has the sequence's loss, so with `algo.reduction = "sequence_mean"` this is GSPO (Zheng et
    al. 2025, "Group Sequence Policy Optimization", arXiv 2507.18071, equations 5 to 7); its clip is three orders of
    magnitude tighter than a token's. `clip_fraction` counts tokens of clipped sequences.
    """
    ratio = torch.exp(inputs.sequence_mean(inputs.logprobs - inputs.old_logprobs))
    return _clipped(inputs.required_advantages(), ratio, clip_low, clip_high, 0.0)


def cispo(
    inputs: LossInputs, *, clip_low: float = 1.0, clip_high: float = 4.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`-A w log pi` with `w = clip(r, 1 - clip_low, 1 + clip_high)`, detached: weights are clipped, no gradient is cut.

    CISPO (MiniMax 2025, "MiniMax-M1", arXiv 2506.13585, equations 4 and 5). `clip_low = 1` is no lower bound, as in
    the paper's runs. `clip_fraction` counts tokens whose weight was clipped.
    """
    ratio = inputs.ratio.detach()
    weights = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -inputs.required_advantages() * weights * inputs.logprobs, {"clip_fraction": (weights != ratio).float()}


def _clipped(
    advantages: torch.Tensor, ratio: torch.Tensor, clip_low: float, clip_high: float, dual_clip: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(free, clipped)
    cut = clipped > free
    if dual_clip:
        ceiling = -advantages * dual_clip
        over = (advantages < 0) & (loss > ceiling)
        loss, cut = torch.where(over, ceiling, loss), cut | over
    return loss, {"clip_fraction": cut.detach().float()}


def reinforce(inputs: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`-A log pi`, the score-function estimator (Williams 1992, "Simple statistical gradient-following algorithms").

    On-policy: `old_logprobs` do not enter, so several updates per batch are biased unless a correction weighs them.
    """
    return -inputs.required_advantages() * inputs.logprobs, {}


def cross_entropy(inputs: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`-log pi`, the likelihood of demonstrations (supervised warm start)."""
    return -inputs.logprobs, {}
