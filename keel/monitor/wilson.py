"""The Wilson score interval: how sure a success rate over a finite number of tasks is.

E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927): the set of rates
p for which the observed share lies within z standard deviations of p, solved for p. Unlike the normal approximation
it stays inside [0, 1] and has a width at 0 and n successes.
"""

from __future__ import annotations

import math

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal distribution."""


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Lower and upper bound of a success rate, `z` standard deviations wide.

    Raises ValueError unless 0 <= successes <= trials and trials > 0.
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(
            f"wilson_interval: got {successes} successes of {trials}; needs 0 <= successes <= trials, trials > 0"
        )
    return score_interval(successes / trials, trials, z)


def score_interval(rate: float, trials: float, z: float = Z_95) -> tuple[float, float]:
    """The same for an observed rate and a number of trials that need not be whole."""
    shrink = 1.0 / (1.0 + z * z / trials)
    center = shrink * (rate + z * z / (2 * trials))
    half = shrink * z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # At rates 0 and 1 the bound is 0 and 1 exactly; the sum above only comes close.
    return 0.0 if rate == 0.0 else center - half, 1.0 if rate == 1.0 else center + half


def success_metrics(successes: int, trials: int) -> dict[str, float]:
    """What `RunLog.log_eval` wants to know of an evaluation: the rate, its 95 % interval and the number of tasks."""
    low, high = wilson_interval(successes, trials)
    return {"success": successes / trials, "success_low": low, "success_high": high, "num_tasks": trials}
