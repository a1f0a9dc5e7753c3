"""Which side is at fault, and why: hypotheses about what it computes instead, held against an independent reference.

Three log-probs of every drawn token are compared: the engine's, the learner's, and the reference's. The gap of a side
to the reference says whether it is at fault; the hypotheses (`diagnosis_hypotheses`) that make the reference say what
that side says, say why. What a side's log-probs look like when no hypothesis reproduces them is judged last, by what
is off and what is not (`diagnosis_patterns`).

Figures are mean absolute differences of log-probs in nats, the largest 2 % of tokens left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from keel.causes import Side
from keel.preflights.diagnosis_evidence import Array, Evidence, StackFacts
from keel.preflights.diagnosis_hypotheses import Hypothesis, hypotheses
from keel.preflights.diagnosis_pairs import best_pair
from keel.preflights.diagnosis_patterns import by_pattern, rows_of
from keel.preflights.diagnosis_predict import Predictor, level
from keel.preflights.diagnosis_search import Fit, Search
from keel.preflights.reference import Reference
from keel.preflights.result import Attribution
from keel.preflights.stack import ProbeData

SIDES: tuple[Side, ...] = ("engine", "learner")
HEALTHY_FACTORS = {"float32": 10.0, "bfloat16": 1.8}
FLOAT32_FLOOR = 2e-5
"""Nats that nobody calls a fault in float32, whatever rounding was measured."""
SECOND_MUST_LEAVE = {"float32": 0.6, "bfloat16": 0.88}
"""A second cause is believed if it leaves at most this share of what the first left."""
LEAST_SHARE = 0.25
"""A cause that does not reach the noise is named only if this much of the gap goes away with it."""
PASSES = 300
"""What a search for two causes takes, about."""
MOST_TOKENS = {"float32": 1800, "bfloat16": 3600}
"""Tokens of the probes that are looked at; more of them change nothing but the time it takes."""


def diagnose(
    reference: Reference, data: ProbeData, facts: StackFacts | None = None, *, budget_s: float = 60.0
) -> tuple[Attribution, ...]:
    """What explains each side's gap to `reference` on the probes, the largest first; empty if there is none.

    `budget_s` is of processor time of this process, so that the answer does not depend on what else the machine does.
    A side without log-probs is left out (an engine's may be all nan, `data.trainer` empty). A model too large for the
    budget is judged on fewer sequences, and what is left unsaid for want of time is said in the text of the row
    "unexplained". A lost stop token is seen in the replies themselves, gap or not.
    """
    facts = facts or StackFacts()
    reference.earlier = facts.earlier
    if facts.pad_token_id is None:
        facts = replace(facts, pad_token_id=getattr(reference.model.config, "pad_token_id", None) or 0)
    started = time.process_time()
    most = MOST_TOKENS[facts.dtype]
    predictor = Predictor(reference, Evidence(chosen_probes(data, most)), facts)
    pass_s = time.process_time() - started
    if budget_s < PASSES * pass_s:
        predictor = Predictor(reference, Evidence(chosen_probes(data, most * budget_s / (PASSES * pass_s))), facts)
    noise = predictor.noise(facts.dtype)
    found = [*lost_stop_tokens(data, facts)]
    for number, side in enumerate(SIDES):
        observed = predictor.evidence.of(side)
        if observed is not None:
            deadline = started + budget_s * (number + 1) / len(SIDES)
            found += _of_side(predictor, side, observed, noise, deadline)
    return _ordered(found)


def _ordered(found: Sequence[Attribution]) -> tuple[Attribution, ...]:
    """What replies show by themselves first, then by nats; a cause that a search fitted is not told twice."""
    fitted = {(each.cause, each.side) for each in found if each.gap_before > 0}
    kept = [each for each in found if each.gap_before > 0 or (each.cause, each.side) not in fitted]
    return tuple(sorted(kept, key=lambda e: (e.cause == "unexplained", e.gap_before > 0, e.gap_after - e.gap_before)))


def chosen_probes(data: ProbeData, most: float) -> ProbeData:
    """Sequences from all over the probes with about `most` tokens; at least two."""
    total = sum(len(each) for each in data.sequences)
    count = min(len(data.sequences), max(2, round(len(data.sequences) * most / max(total, 1))))
    chosen = sorted({round(each) for each in np.linspace(0, len(data.sequences) - 1, count)})
    sequences = tuple(data.sequences[index] for index in chosen)
    return replace(data, sequences=sequences, trainer=tuple(data.trainer[i] for i in chosen) if data.trainer else ())


def healthy_level(noise: float, dtype: str) -> float:
    """The level up to which a residual is rounding, from the rounding that was measured."""
    return max(HEALTHY_FACTORS[dtype] * noise, FLOAT32_FLOOR)


def lost_stop_tokens(data: ProbeData, facts: StackFacts) -> list[Attribution]:
    """Replies without the stop token that ended them, by themselves or by what the learner is shown of them.

    The share of them is the strength; no gap need show.
    """
    stopped = [
        int(sequence.token_ids[reply.stop - 1])
        for sequence in data.sequences
        for reply in sequence.replies
        if reply.finish_reason == "stop" and reply.stop > reply.start
    ]
    found = []
    lost = sum(token not in facts.stop_token_ids for token in stopped)
    if facts.stop_token_ids and lost:
        text = f"{lost} of {len(stopped)} replies that ended at a stop token do not have it"
        found.append(_lost("engine", lost / len(stopped), text))
    if data.trainer:
        evidence = Evidence(data)
        lost = sum(len(evidence.lost_ends(index)) for index in range(len(data.sequences)))
        replies = sum(len(sequence.replies) for sequence in data.sequences)
        if lost >= 2:
            found.append(
                _lost("learner", lost / replies, f"the learner is not shown the end of {lost} of {replies} replies")
            )
    return found


def _lost(side: Side, share: float, text: str) -> Attribution:
    return Attribution("lost_stop_token", side, share, 0.0, 0.0, strength=share, text=text)


def _of_side(predictor: Predictor, side: Side, observed: Array, noise: float, deadline: float) -> list[Attribution]:
    dtype = predictor.facts.dtype
    done = healthy_level(noise, dtype)
    gap = level(observed - predictor.base)
    if gap <= done:
        return []
    candidates = hypotheses(predictor.reference, predictor.evidence, predictor.facts, side)
    search = Search(predictor, observed, done, deadline, stops_early=dtype == "float32")
    chosen = _choose(search, candidates, gap, dtype)
    rows = rows_of(search, chosen, side, gap)
    if chosen.left <= search.done:
        return rows
    return by_pattern(search, candidates, side, gap) or rows


def _choose(search: Search, candidates: Sequence[Hypothesis], gap: float, dtype: str) -> Fit:
    """The single hypothesis that leaves noise alone, else the best pair if it is worth its second half."""
    fits = search.singles(candidates)
    if not fits:
        return Fit((), gap)
    single = _plainest(fits, search.done, dtype)
    if single.left <= search.done:
        return single
    pair = best_pair(search, candidates, fits)
    worth = SECOND_MUST_LEAVE[dtype] * single.left
    if pair is not None and pair.left <= worth and pair.left <= max(search.done, (1.0 - LEAST_SHARE) * gap):
        return pair
    return single if single.left <= (1.0 - LEAST_SHARE) * gap else Fit((), gap)


def _plainest(fits: Sequence[Fit], done: float, dtype: str) -> Fit:
    """The first in order of those as good as the best: equal explanations are told by how plain they are."""
    best = min(fit.left for fit in fits)
    enough = max(best * 1.03, done if dtype == "float32" else 0.0)
    return next(fit for fit in fits if fit.left <= enough)
