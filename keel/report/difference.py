"""Do two success rates differ? The interval of their difference.

R. G. Newcombe, "Interval estimation for the difference between independent proportions: comparison of eleven methods",
Statistics in Medicine 17 (1998), method 10: the two Wilson intervals, put together as independent errors are. The
samples are taken as independent; attempts of two runs at the same tasks are rather paired, which makes it cautious.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keel.monitor.wilson import wilson_interval
from keel.report.plain import number


@dataclass(frozen=True, slots=True)
class Difference:
    """`value` = second rate - first rate, with its 95 % interval; it `differs` if the interval leaves 0 out."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        return self.low > 0 or self.high < 0


def difference(first: float, first_trials: int, second: float, second_trials: int) -> Difference:
    """95 % interval of `second - first`, two rates in [0, 1] over so many trials.

    Raises ValueError for a rate outside [0, 1] or trials below 1.
    """
    low_1, high_1 = wilson_interval(round(first * first_trials), first_trials)
    low_2, high_2 = wilson_interval(round(second * second_trials), second_trials)
    value = second - first
    return Difference(
        value,
        value - math.hypot(second - low_2, high_1 - first),
        value + math.hypot(high_2 - second, first - low_1),
    )


def success_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> Difference | None:
    """Of two evaluations with `success` and `num_tasks`; None if one of them does not say both."""
    rates = [number(row.get("success"), 12) for row in (first, second)]
    trials = [number(row.get("num_tasks")) for row in (first, second)]
    if any(rate is None or not 0 <= rate <= 1 for rate in rates) or any(not count or count < 1 for count in trials):
        return None
    return difference(rates[0] or 0.0, int(trials[0] or 0), rates[1] or 0.0, int(trials[1] or 0))
