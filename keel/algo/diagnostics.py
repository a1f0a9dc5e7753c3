"""What importance weights do to a batch: sums that add up over micro-batches and ranks, and figures made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from keel.algo.correction.base import CorrectionInputs
from keel.algo.reduce import masked_sum

__all__ = ["correction_summary", "correction_sums"]


def correction_sums(
    inputs: CorrectionInputs, weights: torch.Tensor | None, kept: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sums over loss tokens behind `correction_summary`; `kept [T]` is the mask after rejections. float64 scalars."""
    ratio = torch.exp(inputs.log_ratio.double())
    ones = torch.ones_like(ratio)
    weight = ones if weights is None else weights.double()
    mask = inputs.loss_mask
    return {
        "tokens": masked_sum(ones, mask),
        "kept": masked_sum(ones, kept),
        "weight": masked_sum(weight, kept),
        "weight_squared": masked_sum(weight.square(), kept),
        "ratio_squared": masked_sum(ratio.square(), mask),
        "old_logprobs": masked_sum(inputs.old_logprobs, mask),
        "rollout_logprobs": masked_sum(inputs.rollout_logprobs, mask),
    }


def correction_summary(sums: Mapping[str, float]) -> dict[str, float]:
    """Figures of a batch, from the sums of all its micro-batches.

    `correction/ess`: effective sample size of the kept tokens' weights as a share, `(sum w)^2 / (n sum w^2)` (Kong
    1992). `correction/chi2`: `mean(r^2) - 1`, an estimate of the chi-squared divergence of learner from engine per
    token. `correction/kept_share`: of the loss tokens. `correction/learner_perplexity` and `_engine_perplexity`: exp of
    minus the mean log-prob that each side gives the drawn tokens.
    """
    tokens, kept = sums["tokens"], sums["kept"]
    if not tokens:
        return {}
    ess = sums["weight"] ** 2 / (kept * sums["weight_squared"]) if kept and sums["weight_squared"] else 0.0
    return {
        "correction/ess": ess,
        "correction/chi2": sums["ratio_squared"] / tokens - 1.0,
        "correction/kept_share": kept / tokens,
        "correction/learner_perplexity": _exp(-sums["old_logprobs"] / tokens),
        "correction/engine_perplexity": _exp(-sums["rollout_logprobs"] / tokens),
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf  # beyond it a float overflows
