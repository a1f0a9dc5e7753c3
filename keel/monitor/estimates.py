"""Estimates from several attempts at each of several tasks, with 95 % intervals.

Attempts at one task are alike: a hard task fails again and again. So tasks, not attempts, are what was drawn at random,
and every interval here is about the mean over tasks of something measured on each (a cluster mean).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from keel.monitor.wilson import Z_95, score_interval


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over `num_tasks` tasks and its 95 % interval; the bounds are None where the tasks tell nothing of it."""

    value: float
    low: float | None
    high: float | None
    num_tasks: int


def pass_at_k(num_attempts: int, num_successes: int, k: int) -> float:
    """The chance that at least one of `k` attempts succeeds, from `num_attempts` n of which `num_successes` c did.

    1 - C(n - c, k) / C(n, k), the share of the k-subsets of the attempts that hold a success, which is unbiased:
    Chen et al., "Evaluating Large Language Models Trained on Code" (2021), equation 1. (1 - (1 - c / n)^k is not.)
    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    if not (1 <= k <= num_attempts and 0 <= num_successes <= num_attempts):
        raise ValueError(f"pass_at_k: got n = {num_attempts}, c = {num_successes}, k = {k}; needs 1 <= k <= n, c <= n")
    return 1.0 - math.comb(num_attempts - num_successes, k) / math.comb(num_attempts, k)


def share_estimate(shares: Sequence[float], trials_per_task: float) -> Estimate:
    """The mean of a share measured on each task, with Wilson's interval at the effective number of trials.

    That number is p (1 - p) / v: the trials of which a simple random sample would have the variance v that the mean
    over tasks has here (Kish's design effect; intervals of this kind are compared by Franco et al., "Comparative Study
    of Confidence Intervals for Proportions in Complex Sample Surveys", J. Surv. Stat. Methodol. 7, 2019, whose
    correction for few clusters, (z / t)^2 with one degree of freedom less than tasks, is applied too). It is never
    more than `trials_per_task` for each task; where every share is 0 or 1 it is the number of tasks, as if attempts at
    a task were all the same. So with one attempt a task this is the plain Wilson interval.
    """
    num_tasks = len(shares)
    mean = sum(shares) / num_tasks
    effective = float(num_tasks)
    if any(share not in (0.0, 1.0) for share in shares):
        variance = statistics.variance(shares) / num_tasks if num_tasks > 1 else 0.0
        most = num_tasks * trials_per_task
        effective = min(most, mean * (1 - mean) / variance) if variance > 0 else most
        if num_tasks > 1:
            effective *= (Z_95 / t_quantile(num_tasks - 1)) ** 2
    return Estimate(mean, *score_interval(mean, effective), num_tasks)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """The mean of a number measured on each task, with Student's t interval.

    Without one for a single task, and where all are the same: a spread that was not seen is not a spread of zero.
    """
    num_tasks = len(values)
    mean = sum(values) / num_tasks
    if len(set(values)) < 2:
        return Estimate(mean, None, None, num_tasks)
    half = t_quantile(num_tasks - 1) * statistics.stdev(values) / math.sqrt(num_tasks)
    return Estimate(mean, mean - half, mean + half, num_tasks)


def t_quantile(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t distribution.

    Exact for 1 and 2 degrees of freedom, else the expansion in 1 / degrees of Abramowitz and Stegun, 26.7.5, which is
    within 0.3 % at 3 and better above.
    """
    if degrees == 1:
        return math.tan(0.475 * math.pi)
    if degrees == 2:
        return 0.95 / math.sqrt(2 * 0.975 * 0.025)
    z = Z_95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(degrees**power) for power, term in enumerate(terms, start=1))
