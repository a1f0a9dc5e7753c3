"""The search: which hypothesis, or which two together, leave the least of a side's gap to the reference.

One hypothesis at a time first, its strength fitted. If none leaves noise alone, pairs: the effect of each on the
log-probs is known by then, and effects nearly add, so that least squares over two effects ranks all pairs without a
pass of the model; the best few are then computed for real, strengths fitted together.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from keel.preflights.diagnosis_evidence import Array
from keel.preflights.diagnosis_hypotheses import Hypothesis
from keel.preflights.diagnosis_predict import Predictor, level

PAIRS_TRIED = 16
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True)
class Fit:
    """Hypotheses with their strengths, and the level of what they leave."""

    hypotheses: tuple[Hypothesis, ...]
    left: float


class Search:
    """Explains `observed [N]`; `done` is the level at which nothing is left to explain."""

    def __init__(self, predictor: Predictor, observed: Array, done: float, deadline: float) -> None:
        self.predictor, self.observed, self.done, self.deadline = predictor, observed, done, deadline
        self.was_cut_short = False

    def left(self, hypotheses: Sequence[Hypothesis]) -> float:
        """Level of what `hypotheses` leave; infinite if they predict nothing finite."""
        value = level(self.observed - self.predictor.logprobs(hypotheses))
        return value if math.isfinite(value) else math.inf

    def singles(self, candidates: Sequence[Hypothesis], given: tuple[Hypothesis, ...] = ()) -> list[Fit]:
        """Every candidate beside what is `given`, its strength fitted, in the order of the candidates."""
        fits = []
        for candidate in candidates:
            if time.monotonic() > self.deadline:
                self.was_cut_short = True
                break
            fits.append(self.fit((*given, candidate), len(given)))
        return fits

    def fit(self, hypotheses: tuple[Hypothesis, ...], place: int) -> Fit:
        """`hypotheses` with the strength of the one at `place` fitted."""
        hypothesis = hypotheses[place]
        if not hypothesis.grid:
            return Fit(hypotheses, self.left(hypotheses))

        def put(value: float) -> tuple[Hypothesis, ...]:
            return (*hypotheses[:place], hypothesis.at(value), *hypotheses[place + 1 :])

        def loss(value: float) -> float:
            return self.left(put(value))

        value, left = _refined(loss, hypothesis.grid)
        value, left = self._stepped(put, value, left, hypothesis.grid)
        return Fit(put(value), left)

    def _stepped(
        self, put: Callable[[float], tuple[Hypothesis, ...]], value: float, left: float, grid: tuple[float, ...]
    ) -> tuple[float, float]:
        """Gauss-Newton on the strength: near the right one log-probs are linear in it, so a few steps reach noise."""
        low, high = min(grid) / 4, max(grid) * 4
        for _ in range(4):
            here = self.predictor.logprobs(put(value))
            nearby = value * 1.01
            slope = (self.predictor.logprobs(put(nearby)) - here) / (nearby - value)
            wrong = self.observed - here
            usable = np.isfinite(wrong) & np.isfinite(slope)
            usable &= np.abs(wrong) <= np.quantile(np.abs(wrong[usable]), 0.95) if usable.any() else False
            norm = float((slope[usable] ** 2).sum())
            if norm == 0.0:
                break
            new = min(high, max(low, value + float((slope[usable] * wrong[usable]).sum()) / norm))
            new_left = self.left(put(new))
            if new_left >= left * 0.999:
                break
            value, left = new, new_left
            if left <= self.done:
                break
        return value, left

    def pairs(self, fits: Sequence[Fit]) -> list[Fit]:
        """The most promising pairs among `fits` (one hypothesis each), fitted together; best first."""
        found = []
        for first, second in self._ranked_pairs(fits)[:PAIRS_TRIED]:
            if time.monotonic() > self.deadline:
                self.was_cut_short = True
                break
            fit = Fit((first, second), self.left((first, second)))
            if first.grid or second.grid:
                for _ in range(3):
                    before = fit.left
                    for place in (0, 1):
                        fit = min(fit, self.fit(fit.hypotheses, place), key=lambda each: each.left)
                    if fit.left <= self.done or fit.left > 0.7 * before:
                        break
            found.append(fit)
            if fit.left <= self.done:
                break
        return sorted(found, key=lambda each: each.left)

    def _ranked_pairs(self, fits: Sequence[Fit]) -> list[tuple[Hypothesis, Hypothesis]]:
        """Pairs of compatible hypotheses by what least squares over their effects leaves."""
        each = [fit.hypotheses[0] for fit in fits]
        gap = self.observed - self.predictor.base
        effects = [self.predictor.logprobs([one]) - self.predictor.base for one in each]
        ranked: list[tuple[float, int, int]] = []
        for first, second in itertools.combinations(range(len(each)), 2):
            if not compatible(each[first], each[second]):
                continue
            left = _left_by_both(gap, effects[first], effects[second])
            left = min(left, 0.98 * fits[first].left, 0.98 * fits[second].left)
            ranked.append((left, first, second))
        return [(each[first], each[second]) for _, first, second in sorted(ranked)]


def compatible(first: Hypothesis, second: Hypothesis) -> bool:
    """Can both be true, and say two things?"""
    if first.cause == second.cause or (first.reading is not None and second.reading is not None):
        return False
    if {first.cause, second.cause} in ({"window_off", "window_off_by_one"}, {"stale_version", "stale_tensor_group"}):
        return False
    return not ({first.cause, second.cause} <= {"wrong_temperature", "raw_logprobs", "top_p_not_undone"})


def _left_by_both(gap: Array, first: Array, second: Array) -> float:
    usable = np.isfinite(gap) & np.isfinite(first) & np.isfinite(second)
    if usable.sum() < 4:
        return math.inf
    columns = np.stack([first[usable], second[usable]], axis=1)
    weights, *_ = np.linalg.lstsq(columns, gap[usable], rcond=None)
    return level(gap[usable] - columns @ np.clip(weights, 0.0, 2.0))


def _refined(loss: Callable[[float], float], grid: tuple[float, ...]) -> tuple[float, float]:
    """The best value of the grid, then a golden section (of logarithms) between its neighbours."""
    values = sorted(grid)
    losses = [loss(value) for value in values]
    best = int(np.argmin(losses))
    low = math.log(values[best - 1] if best else values[0] / 2)
    high = math.log(values[best + 1] if best + 1 < len(values) else values[-1] * 2)
    known = {values[best]: losses[best]}
    for _ in range(6):
        inner = [math.exp(high - GOLDEN * (high - low)), math.exp(low + GOLDEN * (high - low))]
        for value in inner:
            known.setdefault(value, loss(value))
        if known[inner[0]] < known[inner[1]]:
            high = math.log(inner[1])
        else:
            low = math.log(inner[0])
    value = min(known, key=lambda each: known[each])
    return value, known[value]
