"""Advantages: `(rewards [G], *, options) -> [G]`, the attempts at one task compared with one another.

Every function gives exact zeros when the rewards of the group do not differ: there is nothing to learn from it.
"""

from __future__ import annotations

import torch

__all__ = ["group_mean", "group_mean_std", "leave_one_out"]


def group_mean(rewards: torch.Tensor) -> torch.Tensor:
    """`r_i - mean(r)`: a baseline and nothing else.

    GRPO without its division by the standard deviation, which would weigh nearly solved and nearly hopeless tasks
    highest ("Dr. GRPO": Liu et al. 2025, "Understanding R1-Zero-Like Training", arXiv 2503.20783).
    """
    return _unless_equal(rewards, rewards - rewards.mean())


def group_mean_std(rewards: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """`(r_i - mean(r)) / (std(r) + eps)`, standard deviation with G - 1 in the denominator.

    GRPO (Shao et al. 2024, "DeepSeekMath", arXiv 2402.03300, equation 4 and the text before it).
    """
    if rewards.numel() < 2:
        return torch.zeros_like(rewards)
    return _unless_equal(rewards, (rewards - rewards.mean()) / (rewards.std(correction=1) + eps))


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """`r_i - mean of the others`, an unbiased baseline; G / (G - 1) times `group_mean`.

    RLOO (Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024,
    arXiv 2402.14740). A group of one has no others and no advantage.
    """
    size = rewards.numel()
    if size < 2:
        return torch.zeros_like(rewards)
    others = (rewards.sum() - rewards) / (size - 1)
    return _unless_equal(rewards, rewards - others)


def _unless_equal(rewards: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    # 0.1 - mean(0.1, 0.1, 0.1) is not 0 in binary; divided by a standard deviation of 1e-9 it would even be large.
    return torch.where((rewards == rewards[:1]).all(), torch.zeros_like(advantages), advantages)
