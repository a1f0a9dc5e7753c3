"""Per-token estimators of KL(policy || reference) from tokens the policy drew: `(logprobs [T], reference [T]) -> [T]`.

Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html), with `d = logprobs - reference` the
log ratio of the policy to the reference. As *estimates*, k1 and k3 are unbiased and k2 is biased with small variance.
As *losses* what counts is the mean of their gradient: that of k1 is zero whatever the policies (it is the mean score),
that of k2 is the gradient of the KL divergence, that of k3 is the gradient of the opposite KL(reference || policy),
which near the reference is the same.
"""

from __future__ import annotations

import torch

__all__ = ["k1", "k2", "k3"]


def k1(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`d`: unbiased, can be negative."""
    return logprobs - reference


def k2(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`d^2 / 2`: never negative, biased when the policies are far apart."""
    return 0.5 * (logprobs - reference).square()


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`exp(-d) - 1 + d`: unbiased and never negative."""
    difference = reference - logprobs
    return torch.expm1(difference) - difference
