"""What is told of a side: rows of what was found; and, where no hypothesis reproduces a gap, by where the gap lies.

Which tokens of an earlier reply came back in two, or how exactly a router is off, cannot be had from a few hundred
log-probs. But the first replies of such a stack are right and only later ones are not; and with the side's own choice
of experts in place of the reference's, most of such a gap is gone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from keel.causes import CAUSES, Side
from keel.preflights.diagnosis_hypotheses import Hypothesis
from keel.preflights.diagnosis_predict import level
from keel.preflights.diagnosis_search import Fit, Search
from keel.preflights.result import Attribution

Bools = npt.NDArray[np.bool_]
OF_ANOTHER_TOKEN = 3.0
"""Nats: where a token was told in two, the learner's log-prob is that of the first piece, which nobody drew."""
LATER_IS_WORSE = 3.0
"""Later replies are off if their level is so many times that of the first ones, which are at the noise."""


def by_pattern(search: Search, candidates: Sequence[Hypothesis], side: Side, gap: float) -> list[Attribution]:
    """Rows for a gap of which hypotheses leave more than noise; empty if there is no such pattern."""
    first = np.array([turn == 0 for _, turn in search.predictor.evidence.replies])
    if side == "learner":  # it is shown whole sequences: an earlier reply is read otherwise in its own place too
        first = ~_followed(search)
    if 8 <= int(first.sum()) < len(first):
        told = _right_at_first(search, candidates, first, side, gap)
        if told:
            return told
    return _onset_in_earlier_replies(search, side, gap)


def _followed(search: Search) -> Bools:
    """`[N]` tokens of sequences with several replies."""
    several = [len(sequence.replies) > 1 for sequence in search.predictor.evidence.sequences]
    return np.array([several[index] for index, _ in search.predictor.evidence.replies])


def _right_at_first(
    search: Search, candidates: Sequence[Hypothesis], first: Bools, side: Side, gap: float
) -> list[Attribution]:
    """If something explains first replies down to the noise, later ones are read otherwise."""
    part = Search(
        search.predictor, np.where(first, search.observed, np.nan), search.done, search.deadline, stops_early=True
    )
    early = Fit((), part.left([]))
    if early.left > search.done:
        plain = [each for each in candidates if each.reading is None or each.cause != "retokenized_turns"]
        early = min(part.singles(plain), key=lambda fit: fit.left, default=early)
    if early.left > search.done:
        return []
    later = search.observed - search.predictor.logprobs(early.hypotheses)
    left, left_later = level(later), level(later[~first])
    if left_later < LATER_IS_WORSE * search.done / 2 or not math.isfinite(left_later):
        return []
    whole = Fit(early.hypotheses, left)
    rows = [row for row in rows_of(search, whole, side, gap) if row.cause != "unexplained"]
    share = max(0.0, (left - search.done) / gap)
    text = "first replies are right, what comes after an earlier reply is not: it was read in other tokens"
    rows.append(Attribution("retokenized_turns", side, share, gap, gap * (1.0 - share), text=text))
    return rows


def _onset_in_earlier_replies(search: Search, side: Side, gap: float) -> list[Attribution]:
    """A learner that reads an earlier reply in other tokens is right up to the first of these, and wrong from there."""
    if side != "learner":
        return []
    off = np.abs(search.observed - search.predictor.base)
    right_at_first, jumps = [], []
    for index in range(len(search.predictor.evidence.sequences)):
        own = off[search.predictor.evidence.sequence == index]
        wrong = own > 10 * search.done
        if wrong.any():
            right_at_first.append(int(wrong.argmax()) > 0)
            jumps.append(float(own[wrong.argmax()]))
    if len(right_at_first) < 2 or sum(right_at_first) < 0.5 * len(right_at_first):
        return []
    if search.predictor.reference.routers and float(np.median(jumps)) < OF_ANOTHER_TOKEN:
        return []  # another choice of experts begins somewhere too, and moves by less
    share = max(0.0, (gap - search.done) / gap)
    text = "right up to a token of an earlier reply, wrong from there on: the reply was read in other tokens"
    return [Attribution("retokenized_turns", side, share, gap, gap * (1.0 - share), text=text)]


def rows_of(search: Search, chosen: Fit, side: Side, gap: float) -> list[Attribution]:
    """What is told of `chosen`, and of what it leaves."""
    rows = []
    for hypothesis, share in zip(chosen.hypotheses, _shares(search, chosen, gap), strict=True):
        rows.append(
            Attribution(
                hypothesis.cause,
                side,
                explained=share,
                gap_before=gap,
                gap_after=gap * (1.0 - share),
                layer=hypothesis.layer,
                strength=hypothesis.strength,
                group=hypothesis.group,
                text=f"{CAUSES[hypothesis.cause].title} ({hypothesis.text})",
            )
        )
    if chosen.left > search.done and chosen.left > 0.02 * gap:
        text = "time ran out before every hypothesis was tried" if search.was_cut_short else ""
        left = chosen.left / gap
        rows.append(Attribution("unexplained", side, left, gap_before=gap, gap_after=chosen.left, text=text))
    return rows


def _shares(search: Search, chosen: Fit, gap: float) -> list[float]:
    """What each of one or two causes takes away: the mean over both orders of undoing them (Shapley's value)."""
    together = max(0.0, 1.0 - chosen.left / gap)
    if len(chosen.hypotheses) < 2:
        return [together] * len(chosen.hypotheses)
    alone = [1.0 - search.left([each]) / gap for each in chosen.hypotheses]
    first = float(np.clip(0.5 * (alone[0] + together - alone[1]), 0.02 * together, 0.98 * together))
    return [first, together - first]
