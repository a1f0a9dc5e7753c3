"""Do two success rates differ? The interval of their difference, from the interval of each.

G. Y. Zou and A. Donner, "Construction of confidence limits about effect measures: a general approach", Statistics in
Medicine 27 (2008): each bound of the difference puts the distances of two bounds together as independent errors are
("square and add"). With two Wilson intervals it is method 10 of R. G. Newcombe, Statistics in Medicine 17 (1998). The
samples are taken as independent; two runs evaluated on the same tasks are rather paired, which makes it cautious.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keel.monitor.wilson import wilson_interval
from keel.report.plain import number


@dataclass(frozen=True, slots=True)
class Estimate:
    """A rate and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference(Estimate):
    """Second rate - first rate; it `differs` from 0 if its interval leaves 0 out."""

    @property
    def differs(self) -> bool:
        return self.low > 0 or self.high < 0


def difference(first: Estimate, second: Estimate) -> Difference:
    """95 % interval of `second - first`."""
    value = second.value - first.value
    return Difference(
        value,
        value - math.hypot(second.value - second.low, first.high - first.value),
        value + math.hypot(second.high - second.value, first.value - first.low),
    )


def success_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> Difference | None:
    """Of two evaluations; None if one of them has no success rate with an interval."""
    one, other = success_of(first), success_of(second)
    return None if one is None or other is None else difference(one, other)


def success_of(evaluation: Mapping[str, Any]) -> Estimate | None:
    """`success` with the interval that the evaluation gives, or else Wilson's over its `num_tasks`; None without."""
    value, low, high = (number(evaluation.get(f"success{end}"), 12) for end in ("", "_low", "_high"))
    if value is None or not 0 <= value <= 1:
        return None
    if low is not None and high is not None and low <= value <= high:
        return Estimate(value, low, high)
    trials = number(evaluation.get("num_tasks"))
    if trials is None or trials < 1:
        return None
    return Estimate(value, *wilson_interval(round(value * int(trials)), int(trials)))
