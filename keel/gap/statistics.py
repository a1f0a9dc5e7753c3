"""Statistics of the per-token gap, ours and under the names that other trainers give the same things.

All are functions of two arrays about the same drawn tokens: `rollout [T]`, the engine's log-probs when it drew them,
and `learner [T]`, what the learner gives them before it has learned from them. With `d = learner - rollout` and `r =
exp(d)`, everything is computed in float64 from all tokens at once, so no figure depends on how a batch was cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

__all__ = ["PEER_METRICS", "PeerMetric", "gap_statistics", "peer_statistics"]

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class PeerMetric:
    """A figure that another trainer logs: what it is in ours, and what its makers call healthy (None: no number)."""

    name: str
    peer: str
    formula: str
    ours: str  # the statistic of `gap_statistics` that is the same number; "" if none is
    healthy_max: float | None
    band: str
    source: str  # file of the peer's repository, and where the band is from


PEER_METRICS: tuple[PeerMetric, ...] = (
    PeerMetric(
        "rollout_probs_diff_mean",
        "verl",
        "mean |exp(learner) - exp(rollout)|",
        "",
        0.005,
        "below 0.005; above 0.01 a precision problem",
        "verl/utils/debug/metrics.py and docs/faq/faq.rst at 1dda039",
    ),
    PeerMetric(
        "rollout_probs_diff_max",
        "verl",
        "max |exp(learner) - exp(rollout)|",
        "",
        None,
        "none published",
        "verl/utils/debug/metrics.py at 1dda039",
    ),
    PeerMetric(
        "rollout_probs_diff_std",
        "verl",
        "standard deviation (n - 1) of |exp(learner) - exp(rollout)|",
        "",
        None,
        "none published",
        "verl/utils/debug/metrics.py at 1dda039",
    ),
    PeerMetric(
        "token_mult_prob_error",
        "NeMo-RL",
        "mean exp(|d|)",
        "",
        1.05,
        "near 1; growth past 1.01 to 1.02 is suspect, above 1.05 a fault",
        "nemo_rl/algorithms/loss/loss_functions.py, docs/guides/grpo.md and dtensor-tp-accuracy.md at 7ea279a",
    ),
    PeerMetric(
        "gen_kl_error",
        "NeMo-RL",
        "mean (exp(d) - 1 - d), its default estimator k3",
        "k3",
        0.002,
        "about 0.001; its tests ask for less than 0.001 to 0.002",
        "nemo_rl/algorithms/utils.py, docs/guides/grpo.md and tests/functional/grpo.sh at 7ea279a",
    ),
    PeerMetric(
        "mismatch_kl",
        "prime-rl",
        "mean (r - d - 1)",
        "k3",
        0.01,
        "its tests ask for less than 0.0005 (nightly, mathematics) to 0.01 (reverse-text)",
        "src/prime_rl/trainer/rl/loss.py and tests/nightly/test_hendrycks_sanity.py at 559b447",
    ),
    PeerMetric(
        "train_rollout_logprob_abs_diff",
        "slime, miles",
        "mean over rollouts of each one's mean |d|",
        "",
        0.1,
        "slime's tests ask for at most 0.1 (1e-6 where it is deterministic); miles: well below 1",
        "slime/backends/megatron_utils/loss.py and slime/utils/arguments.py at 624b824; miles "
        "miles/backends/training_utils/loss_hub/losses.py and docs/user-guide/monitoring.md at 31f1ca9",
    ),
    PeerMetric(
        "sampling_logp_difference_mean",
        "TRL",
        "mean |d|",
        "abs_mean",
        None,
        "none published",
        "trl/trainer/grpo_trainer.py of TRL 1.16.0 (sampling/sampling_logp_difference/mean)",
    ),
)
"""In the order they are shown."""


def gap_statistics(rollout: Array, learner: Array) -> dict[str, float]:
    """Our own figures about T tokens; empty for none.

    `tokens` (T); `abs_mean`, `abs_p50`, `abs_p90`, `abs_p99`, `abs_max` of |d| in nats, percentiles interpolated
    between the two nearest tokens; `k1` = mean(-d) and `k3` = mean(exp(d) - 1 - d), which estimate KL(engine ||
    learner), for the engine drew the tokens (Schulman 2020, "Approximating KL Divergence"); `ess`, the effective sample
    size of r as a share, (sum r)^2 / (T sum r^2) (Kong 1992); `chi2` = mean(r^2) - 1, an estimate of the chi-squared
    divergence of the learner from the engine. What overflows is infinite. Raises ValueError for shapes that differ or a
    NaN.
    """
    d = _difference(rollout, learner)
    if not d.size:
        return {}
    gap = np.abs(d)
    with np.errstate(over="ignore"):
        # Scaled by the largest, which leaves the share as it is and cannot overflow.
        scaled = np.exp(d - d.max())
        percentiles = np.percentile(gap, PERCENTILES)
        return {
            "tokens": float(d.size),
            "abs_mean": float(gap.mean()),
            **{f"abs_p{each}": float(value) for each, value in zip(PERCENTILES, percentiles, strict=True)},
            "abs_max": float(gap.max()),
            "k1": float(-d.mean()),
            "k3": float((np.expm1(d) - d).mean()),
            "ess": float(scaled.sum() ** 2 / (d.size * np.square(scaled).sum())),
            "chi2": float(np.expm1(2 * d).mean()),
        }


def peer_statistics(rollout: Array, learner: Array, trajectory: Array | None = None) -> dict[str, float]:
    """The figures of `PEER_METRICS` by name; empty for no tokens.

    `trajectory [T]` says whose token each is (None: all are one's), for the mean that takes every rollout alike;
    rollouts without a compared token do not count. The standard deviation of one token is 0. Raises as `gap_statistics`
    does.
    """
    d = _difference(rollout, learner)
    if not d.size:
        return {}
    apart = np.abs(np.exp(np.asarray(learner, np.float64)) - np.exp(np.asarray(rollout, np.float64)))
    with np.errstate(over="ignore"):
        k3 = float((np.expm1(d) - d).mean())
        multiple = float(np.exp(np.abs(d)).mean())
    return {
        "rollout_probs_diff_mean": float(apart.mean()),
        "rollout_probs_diff_max": float(apart.max()),
        "rollout_probs_diff_std": float(apart.std(ddof=1)) if d.size > 1 else 0.0,
        "token_mult_prob_error": multiple,
        "gen_kl_error": k3,
        "mismatch_kl": k3,
        "train_rollout_logprob_abs_diff": _mean_of_means(np.abs(d), trajectory),
        "sampling_logp_difference_mean": float(np.abs(d).mean()),
    }


def _mean_of_means(values: Array, owner: Array | None) -> float:
    if owner is None:
        return float(values.mean())
    _, place = np.unique(owner, return_inverse=True)
    return float((np.bincount(place, values) / np.bincount(place)).mean())


def _difference(rollout: Array, learner: Array) -> Array:
    """[T] float64 `d`, checked."""
    if rollout.shape != learner.shape or rollout.ndim != 1:
        raise ValueError(f"gap: got shapes {rollout.shape} and {learner.shape}; one number a token from either side")
    d = np.asarray(learner, np.float64) - np.asarray(rollout, np.float64)
    if np.isnan(d).any():
        place = int(np.flatnonzero(np.isnan(d))[0])
        raise ValueError(
            f"gap: token {place} is {rollout[place]} on the engine's side and {learner[place]} on the learner's; "
            "what is no number has no gap, leave it out or find out why"
        )
    return d
