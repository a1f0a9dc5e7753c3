"""Rejections: corrections that leave tokens or whole trajectories out (see the package for r, R and d).

What is out of bounds leaves the loss mask: neither the sum of the loss nor its denominator has it. A bound is always on
the named quantity itself, low and high, both included; the docstrings say which kind of token each side removes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from keel.algo import kl
from keel.algo.correction.base import Average, Correction, CorrectionInputs
from keel.algo.correction.weights import sequence_ratio

__all__ = ["reject", "sequence_masked", "token_masked", "veto"]

Estimator = Literal["k1", "k2", "k3"]
Over = Literal["token", "sum", "mean", "max"]


def token_masked(inputs: CorrectionInputs, *, low: float = 0.5, high: float = 5.0) -> Correction:
    """Weight r where `low <= r <= high`, nothing elsewhere: masked importance sampling per token.

    IcePop (Ring-1T: Ling Team 2025, "Every Step Evolves", arXiv 2510.18855). `low` removes tokens that the learner
    finds much less likely than the engine did, `high` those it finds much more likely. Raises ValueError unless
    0 <= low < high.
    """
    _check_bounds("token_masked", low, high, least=0.0)
    ratio = torch.exp(inputs.log_ratio)
    return _within(ratio, ratio, low, high)


def sequence_masked(
    inputs: CorrectionInputs,
    *,
    low: float = 0.5,
    high: float = 2.0,
    average: Average = "product",
    weighted: bool = True,
) -> Correction:
    """Whole trajectories whose ratio is in bounds, weighted by it unless `weighted` is false; the others are left out.

    With the product R: masked importance sampling per sequence (Liu, Li et al. 2025, "When Speed Kills Stability").
    With the geometric mean `exp(mean of d)` and bounds as tight as 0.99 to 1.01, unweighted: geometric rejection. The
    product of a long trajectory is far from 1 however small each token's gap, so its bounds reject by length. `low`
    removes what the learner finds less likely. Raises ValueError unless 0 <= low < high.
    """
    _check_bounds("sequence_masked", low, high, least=0.0)
    ratio = sequence_ratio(inputs, average)
    return _within(ratio, ratio if weighted else None, low, high)


def reject(
    inputs: CorrectionInputs,
    *,
    estimator: Estimator = "k3",
    over: Over = "mean",
    low: float = -math.inf,
    high: float = math.inf,
) -> Correction:
    """Leave out what an estimate of KL(engine, learner) in nats puts outside `low` to `high`; weights stay 1.

    The estimators (Schulman 2020, `keel.algo.kl`) of one token are k1 = -d, k2 = d^2 / 2, k3 = e^d - 1 - d. `over`
    "token" judges each token, the others judge a trajectory by the sum, mean or maximum over its loss tokens. Mind the
    sign of k1: `high` removes what the learner finds *less* likely (r < e^-high), `low` what it finds more likely; k2
    and k3 are never negative, so only `high` removes anything. Raises ValueError unless low < high.
    """
    _check_bounds("reject", low, high, least=-math.inf)
    estimators = {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}
    if estimator not in estimators or over not in ("token", "sum", "mean", "max"):
        raise ValueError(
            f"reject: got estimator={estimator!r}, over={over!r}; they are k1 to k3 and token, sum, mean, max"
        )
    values = estimators[estimator](-inputs.log_ratio, torch.zeros_like(inputs.log_ratio)).double()
    if over != "token":
        values = inputs.per_trajectory(values, over)
    return _within(values, None, low, high)


def veto(inputs: CorrectionInputs, *, below: float = 1e-4, above: float = math.inf) -> Correction:
    """Leave out a whole trajectory if any of its loss tokens has `r < below`, `r > above`, or an r that is no number.

    A token that the learner finds ten thousand times less likely than the engine did is no rounding but a fault (a
    wrong template, a stale weight), and its neighbours were drawn after it. "Veto" of slime's mismatch helper
    (`rs_veto_threshold`). Raises ValueError unless 0 <= below < above.
    """
    _check_bounds("veto", below, above, least=0.0)
    ratio = torch.exp(inputs.log_ratio)
    bad = ~((ratio >= below) & (ratio <= above)) & inputs.loss_mask  # a NaN is bad
    struck = inputs.per_trajectory(bad.to(ratio.dtype), "max") > 0
    metrics = {"veto_tokens_share": bad.float(), "masked_share": (struck & inputs.loss_mask).float()}
    return Correction(None, metrics, keep=~struck)


def _within(values: torch.Tensor, weights: torch.Tensor | None, low: float, high: float) -> Correction:
    """Keep where `low <= values <= high` (a NaN is kept nowhere), and say how much left on either side."""
    keep = (values >= low) & (values <= high)
    metrics = {
        "below_share": (values < low).float(),
        "above_share": (values > high).float(),
        "masked_share": (~keep).float(),
    }
    return Correction(weights, metrics, keep=keep)


def _check_bounds(name: str, low: float, high: float, *, least: float) -> None:
    if not least <= low < high:
        raise ValueError(f"{name}: got {low} to {high}; the lower bound must be below the upper and at least {least}")
