"""The search: which hypothesis leaves the least of a side's gap to the reference, its strength fitted.

Pairs of hypotheses are the business of `diagnosis_pairs`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from keel.preflights.diagnosis_evidence import Array
from keel.preflights.diagnosis_hypotheses import Hypothesis
from keel.preflights.diagnosis_predict import Predictor, level
from keel.preflights.diagnosis_readings import together

COUNTED = ("pads", "without_first", "without_last", "gap")
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True)
class Fit:
    """Hypotheses with their strengths, and the level of what they leave."""

    hypotheses: tuple[Hypothesis, ...]
    left: float


class Search:
    """Explains `observed [N]`; `done` is the level at which nothing is left to explain.

    `deadline` is a value of `time.process_time`.
    """

    def __init__(
        self, predictor: Predictor, observed: Array, done: float, deadline: float, *, stops_early: bool = True
    ) -> None:
        """`stops_early`: the first that leaves noise alone is it (where noise is so low that nothing else could)."""
        self.stops_early = stops_early
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
            if time.process_time() > self.deadline:
                self.was_cut_short = True
                break
            fits.append(self.fit((*given, candidate), len(given)))
            if self.stops_early and fits[-1].left <= self.done:
                break
        return fits

    def fit(self, hypotheses: tuple[Hypothesis, ...], place: int) -> Fit:
        """`hypotheses` with the strength of the one at `place` fitted."""
        hypothesis = hypotheses[place]
        if hypothesis.some == "replies":
            return self._some_replies(hypotheses, place)
        if hypothesis.some == "experts":
            return self._some_experts(hypotheses, place)
        if hypothesis.readout is not None and hypothesis.readout.top_p is not None:
            return self._cut(hypotheses, place)
        if hypothesis.reading is not None:
            return self._climbed(hypotheses, place)
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
        """Newton steps: near the right strength log-probs are linear in it, so that a few reach the noise."""
        low, high = min(grid) / 4, max(grid) * 4
        for _ in range(4):
            here = self.predictor.logprobs(put(value))
            nearby = value * 1.002
            slope = (self.predictor.logprobs(put(nearby)) - here) / (nearby - value)
            wrong = self.observed - here
            step = _median_step(wrong, slope)
            new = min(high, max(low, value + step))
            new_left = self.left(put(new))
            if new_left >= left * 0.999:
                break
            value, left = new, new_left
            if left <= self.done:
                break
        return value, left

    def _climbed(self, hypotheses: tuple[Hypothesis, ...], place: int) -> Fit:
        """A number of tokens, and, beside another hypothesis, the numbers next to it as long as less is left."""
        best = Fit(hypotheses, self.left(hypotheses))
        reading = hypotheses[place].reading
        assert reading is not None
        if len(hypotheses) == 1 or reading.kind not in COUNTED:
            return best
        for step in (-1, 1):
            while best.left > self.done:
                value = (best.hypotheses[place].strength or 0.0) + step
                if value < 1:
                    break
                other = (*hypotheses[:place], hypotheses[place].at(value), *hypotheses[place + 1 :])
                left = self.left(other)
                if left >= best.left:
                    break
                best = Fit(other, left)
        return best

    def _some_replies(self, hypotheses: tuple[Hypothesis, ...], place: int) -> Fit:
        """The replies in which the readout at `place` says more than the usual one does."""
        readout = hypotheses[place].readout
        assert readout is not None

        def put(replies: frozenset[tuple[int, int]] | None) -> tuple[Hypothesis, ...]:
            one = replace(hypotheses[place], readout=replace(readout, replies=replies))
            return (*hypotheses[:place], one, *hypotheses[place + 1 :])

        better = np.abs(self.observed - self.predictor.logprobs(put(frozenset())))
        better -= np.abs(self.observed - self.predictor.logprobs(put(None)))
        gained: dict[tuple[int, int], float] = {}
        for reply, gain in zip(self.predictor.evidence.replies, np.nan_to_num(better), strict=True):
            gained[reply] = gained.get(reply, 0.0) + float(gain)
        chosen = put(frozenset(reply for reply, gain in gained.items() if gain > 0))
        return Fit(chosen, self.left(chosen))

    def _some_experts(self, hypotheses: tuple[Hypothesis, ...], place: int) -> Fit:
        """The experts that are concerned, taken in or out one by one as long as less is left."""
        change = hypotheses[place].change
        assert change is not None

        def put(experts: frozenset[int]) -> tuple[Hypothesis, ...]:
            one = replace(hypotheses[place], change=replace(change, experts=tuple(sorted(experts))))
            return (*hypotheses[:place], one, *hypotheses[place + 1 :])

        chosen = frozenset(change.experts or ())
        left = self.left(put(chosen))
        for _ in range(2):
            before = left
            for expert in range(self.predictor.reference.info.num_experts):
                other = chosen ^ {expert}
                other_left = self.left(put(other))
                if other_left < left:
                    chosen, left = other, other_left
            if left <= self.done or left > 0.97 * before:
                break
        return Fit(put(chosen), left)

    def _cut(self, hypotheses: tuple[Hypothesis, ...], place: int) -> Fit:
        """The top-p that was cut at: no token's kept probability is smaller, and every kept one reaches it."""

        def put(top_p: float) -> tuple[Hypothesis, ...]:
            return (*hypotheses[:place], hypotheses[place].at(top_p), *hypotheses[place + 1 :])

        kept = np.exp(self.predictor.logprobs(put(1.0)) - self.observed)
        kept = kept[np.isfinite(kept) & (kept < 0.999)]
        if len(kept) < 4:
            return Fit(hypotheses, math.inf)
        values = [min(0.999, float(np.quantile(kept, share))) for share in (0.0, 0.01, 0.02, 0.05, 0.15)]
        values += list(hypotheses[place].grid)
        fits = [Fit(put(value), self.left(put(value))) for value in values]
        return min(fits, key=lambda each: each.left)


def compatible(first: Hypothesis, second: Hypothesis) -> bool:
    """Can both be true, and say two things?"""
    if first.cause == second.cause:
        return False
    if first.reading is not None and second.reading is not None and not together(first.reading, second.reading):
        return False
    if {first.cause, second.cause} in ({"window_off", "window_off_by_one"}, {"stale_version", "stale_tensor_group"}):
        return False
    return not ({first.cause, second.cause} <= {"wrong_temperature", "raw_logprobs", "top_p_not_undone"})


def _median_step(wrong: Array, slope: Array) -> float:
    """The step d that makes the sum of |wrong - d * slope| smallest: a weighted median, which outliers do not move."""
    usable = np.isfinite(wrong) & np.isfinite(slope) & (np.abs(slope) > 1e-9)
    if not usable.any():
        return 0.0
    steps, weights = wrong[usable] / slope[usable], np.abs(slope[usable])
    order = np.argsort(steps)
    total = np.cumsum(weights[order])
    return float(steps[order][int(np.searchsorted(total, total[-1] / 2))])


def _refined(loss: Callable[[float], float], grid: tuple[float, ...]) -> tuple[float, float]:
    """The best value of the grid, then a golden section (of logarithms) between its neighbours."""
    values = sorted(grid)
    losses = [loss(value) for value in values]
    best = int(np.argmin(losses))
    low = math.log(values[best - 1] if best else values[0] / 2)
    high = math.log(values[best + 1] if best + 1 < len(values) else values[-1] * 2)
    known = {values[best]: losses[best]}
    inner = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
    left = [loss(math.exp(place)) for place in inner]
    for _ in range(5):
        known |= {math.exp(place): value for place, value in zip(inner, left, strict=True)}
        if left[0] < left[1]:
            high, inner, left = inner[1], [inner[1] - GOLDEN * (inner[1] - low), inner[0]], [math.nan, left[0]]
        else:
            low, inner, left = inner[0], [inner[1], inner[0] + GOLDEN * (high - inner[0])], [left[1], math.nan]
        left = [loss(math.exp(place)) if math.isnan(value) else value for place, value in zip(inner, left, strict=True)]
    value = min(known, key=lambda each: known[each])
    return value, known[value]
