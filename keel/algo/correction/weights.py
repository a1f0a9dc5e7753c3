"""Corrections that weigh and reject nothing (see the package for r, R and d)."""

from __future__ import annotations

import torch

from keel.algo.correction.base import Average, Correction, CorrectionInputs, token_local

__all__ = ["none", "normalized", "sequence_ratio", "sequence_truncated", "token_truncated"]


@token_local
def none(inputs: CorrectionInputs) -> Correction:  # noqa: ARG001
    """No correction: tokens count as if the learner had drawn them."""
    return Correction()


@token_local
def token_truncated(inputs: CorrectionInputs, *, cap: float = 2.0) -> Correction:
    """`min(r, cap)`: token-level truncated importance sampling (TIS).

    Truncation: Ionides 2008, "Truncated Importance Sampling"; for rollout mismatch: Yao et al. 2025, "Your Efficient
    RL Framework Secretly Brings You Off-Policy RL Training". The bound is above only: a token the learner finds much
    more likely than the engine did counts at most `cap` times, one it finds less likely counts less, down to 0.
    `truncated_share` is the share of loss tokens at the cap. Raises ValueError if `cap` is not positive.
    """
    _check_cap("token_truncated", cap)
    raw = torch.exp(inputs.old_logprobs - inputs.rollout_logprobs)
    weights = raw.clamp(max=cap)
    return Correction(weights, {"weight_mean": weights, "truncated_share": (raw > cap).float()})


def sequence_truncated(inputs: CorrectionInputs, *, cap: float = 2.0, average: Average = "product") -> Correction:
    """`min(R, cap)` at every token of a trajectory; with `average = "geometric"`, `min(exp(mean of d), cap)`.

    Untruncated, the product makes the gradient unbiased, at a variance that grows with the trajectory's length; the cap
    takes weight from trajectories the learner finds more likely than the engine did. The geometric mean is biased
    whatever the cap, and of bounded variance. Ionides 2008 as above; the two averages: rollout-correction notes of
    verl (`rollout_is = "sequence"`) and of slime's mismatch helper (levels "sequence" and "geometric").
    Raises ValueError if `cap` is not positive.
    """
    _check_cap("sequence_truncated", cap)
    raw = sequence_ratio(inputs, average)
    weights = raw.clamp(max=cap)
    return Correction(weights, {"weight_mean": weights, "truncated_share": (raw > cap).float()})


def normalized(inputs: CorrectionInputs) -> Correction:
    """Divide the weights so far by their mean over the loss tokens that are left: self-normalized weights.

    The weights' scale no longer changes the step; a bias of the order of 1 over the number of tokens takes its place
    (Owen 2013, "Monte Carlo theory, methods and examples", section 9.2). Name it after what weighs.
    """
    if inputs.weights is None or not bool(inputs.loss_mask.any()):
        return Correction()
    mean = inputs.weights[inputs.loss_mask].double().mean()
    scale = 1.0 / mean if float(mean) > 0 else torch.ones_like(mean)
    return Correction(torch.full_like(inputs.weights, float(scale)))


def sequence_ratio(inputs: CorrectionInputs, average: Average) -> torch.Tensor:
    """[T] `R` or its geometric mean, at every row of the trajectory. Raises ValueError for another `average`."""
    if average not in ("product", "geometric"):
        raise ValueError(f"average is 'product' or 'geometric'; got {average!r}")
    # In float64: a sum over thousands of tokens is exponentiated.
    total = inputs.per_trajectory(inputs.log_ratio.double(), "sum" if average == "product" else "mean")
    return torch.exp(total).to(inputs.old_logprobs.dtype)


def _check_cap(name: str, cap: float) -> None:
    if cap <= 0:
        raise ValueError(f"{name}: got cap={cap}; it must be positive (2.0 is usual)")
