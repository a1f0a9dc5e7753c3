"""Two causes at once on the same side.

What a hypothesis about the model says under another readout (temperature, cut, shift) costs no pass: logits are kept.
So every readout is tried with everything else. For two hypotheses about the model, the effect of each on the log-probs
is known from the search for one cause, and effects nearly add: least squares over two effects ranks all pairs without a
pass. The best of both kinds are then computed for real, strengths fitted together.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from keel.preflights.diagnosis_evidence import Array
from keel.preflights.diagnosis_hypotheses import Hypothesis
from keel.preflights.diagnosis_predict import level
from keel.preflights.diagnosis_search import Fit, Search, compatible

REFINED = 10
ROUGHLY_RANKED = 150
ROUNDS = 4


def best_pair(search: Search, candidates: Sequence[Hypothesis], fits: Sequence[Fit]) -> Fit | None:
    """The pair of `candidates` that leaves the least; `fits` are the candidates' own. None if no pair is possible."""
    rough = [variant for each in candidates for variant in variants(search, each)]
    rough += [fit.hypotheses[0] for fit in fits if fit.hypotheses[0].is_fitted]
    found: Fit | None = None
    for ranked in (_with_readout(search, rough), _by_effects(search, rough), _beside_the_best(search, rough, fits)):
        for pair in _distinct(ranked):
            if time.process_time() > search.deadline:
                search.was_cut_short = True
                return found
            fit = together(search, pair)
            if found is None or fit.left < found.left:
                found = fit
            if search.stops_early and fit.left <= search.done:
                return fit
    return found


def variants(search: Search, hypothesis: Hypothesis) -> Iterator[Hypothesis]:
    """`hypothesis` at the first values of what it leaves open."""
    if hypothesis.some == "experts":
        assert hypothesis.change is not None
        for expert in range(search.predictor.reference.info.num_experts):
            yield replace(hypothesis, change=replace(hypothesis.change, experts=(expert,)))
    elif hypothesis.grid:
        for value in hypothesis.grid:
            yield hypothesis.at(value)
    else:
        yield hypothesis


def together(search: Search, pair: tuple[Hypothesis, Hypothesis]) -> Fit:
    """Both of a pair fitted in turns, as long as that leaves less."""
    fit = Fit(pair, search.left(pair))
    for _ in range(ROUNDS):
        before = fit.left
        for place in (1, 0):
            fit = min(fit, search.fit(fit.hypotheses, place), key=lambda each: each.left)
        if fit.left <= search.done or fit.left > 0.9 * before or time.process_time() > search.deadline:
            break
    return fit


Pair = tuple[Hypothesis, Hypothesis]


def _with_readout(search: Search, rough: Sequence[Hypothesis]) -> list[Pair]:
    """Every readout beside everything else, by what they leave."""
    readouts = [each for each in rough if each.readout is not None]
    ranked: list[tuple[float, int, Pair]] = []
    for number, readout in enumerate(readouts):
        others = [*readouts[:number], *(each for each in rough if each.readout is None)]
        for other in others:
            if time.process_time() > search.deadline:
                break
            if compatible(readout, other):
                pair = (other, readout)
                left = search.fit(pair, 1).left if readout.some == "replies" else search.left(pair)
                ranked.append((left, len(ranked), pair))
    return [pair for _, _, pair in sorted(ranked)]


def _by_effects(search: Search, rough: Sequence[Hypothesis]) -> list[Pair]:
    """Pairs about model and reading by what least squares over their two effects leaves."""
    each = [one for one in rough if one.readout is None]
    if len(each) < 2:
        return []
    gap = np.nan_to_num(search.observed - search.predictor.base)
    effects = np.stack([np.nan_to_num(search.predictor.logprobs([one]) - search.predictor.base) for one in each])
    products, along = effects @ effects.T, effects @ gap
    pairs = [
        (-_explained(products, along, first, second), first, second)
        for first, second in itertools.combinations(range(len(each)), 2)
        if compatible(each[first], each[second])
    ]
    ranked = []
    for _, first, second in sorted(pairs)[:ROUGHLY_RANKED]:
        ranked.append((_left_by_both(gap, effects[first], effects[second]), first, second))
    return [(each[first], each[second]) for _, first, second in sorted(ranked)]


def _explained(products: Array, along: Array, first: int, second: int) -> float:
    """The sum of squares that two effects explain, from their inner products."""
    a, b, c = products[first, first], products[first, second], products[second, second]
    determinant = a * c - b * b
    if determinant <= 1e-9 * max(a * c, 1e-30):
        return float(max(along[first] ** 2 / max(a, 1e-30), along[second] ** 2 / max(c, 1e-30)))
    x, y = along[first], along[second]
    return float((c * x * x - 2 * b * x * y + a * y * y) / determinant)


def _left_by_both(gap: Array, first: Array, second: Array) -> float:
    columns = np.stack([first, second], axis=1)
    weights, *_ = np.linalg.lstsq(columns, gap, rcond=None)
    return level(gap - columns @ np.clip(weights, 0.0, 3.0))


def _beside_the_best(search: Search, rough: Sequence[Hypothesis], fits: Sequence[Fit]) -> list[Pair]:
    """What stands alone best, beside everything else, by what they leave; a pass for each."""
    best = min(fits, key=lambda fit: fit.left).hypotheses[0]
    ranked: list[tuple[float, int, Pair]] = []
    for other in rough:
        if time.process_time() > search.deadline:
            break
        if other.readout is None and compatible(best, other):
            left = search.left((best, other))
            ranked.append((left if math.isfinite(left) else math.inf, len(ranked), (best, other)))
    return [pair for _, _, pair in sorted(ranked)]


def _distinct(ranked: Sequence[Pair]) -> list[Pair]:
    """The first of each kind of pair: what differs in a strength alone is fitted to the same."""
    found: dict[tuple[object, ...], Pair] = {}
    for pair in ranked:
        key = tuple(sorted(_kind(each) for each in pair))
        if key not in found:
            found[key] = pair
        if len(found) == REFINED:
            break
    return list(found.values())


def _kind(hypothesis: Hypothesis) -> tuple[str, str, str]:
    part = hypothesis.change
    return hypothesis.cause, hypothesis.text + hypothesis.group + hypothesis.some, str(part and part.layer)
