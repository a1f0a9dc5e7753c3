"""The tokens on which engine and learner differ most: where they stand, and what is written there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from keel.gap.log import LoggedSequence

__all__ = ["Words", "WorstToken", "worst_tokens"]

Words = Callable[[Sequence[int]], str]
"""Token ids as text, special tokens included."""
BEFORE = 12
"""Tokens of text shown before a worst one: enough to find the place, short enough for a line."""


@dataclass(frozen=True, slots=True)
class WorstToken:
    """One token. `gap` is learner minus rollout, in nats. Texts are None without a tokenizer, and foreign: text, never
    markup. `position` counts from 0 in the sequence, prompt included; `drawn_before` how many of it were drawn before.
    `routed_differently` is None where one side's choices of experts are not known."""

    where: str
    position: int
    length: int
    drawn_before: int
    token_id: int
    rollout_logprob: float
    learner_logprob: float
    gap: float
    text: str | None = None
    before: str | None = None
    routed_differently: bool | None = None


def worst_tokens(sequences: Sequence[LoggedSequence], count: int, words: Words | None = None) -> tuple[WorstToken, ...]:
    """The `count` drawn tokens with the largest |gap|, largest first; of equal ones the earlier.

    Sequences that lack a side, and tokens whose log-prob is no number on either, have no gap and are left out.
    """
    sizes, places = [], []
    for index, sequence in enumerate(sequences):
        if sequence.rollout_logprobs is None or sequence.learner_logprobs is None:
            continue
        gaps = np.abs(np.asarray(sequence.learner_logprobs, np.float64) - sequence.rollout_logprobs)
        known = np.flatnonzero(sequence.drawn & np.isfinite(gaps))
        sizes.append(gaps[known])
        places.append(np.stack([np.full(len(known), index), known]))
    if not sizes or count < 1:
        return ()
    size, place = np.concatenate(sizes), np.concatenate(places, axis=1)
    order = np.argsort(-size, kind="stable")[:count]
    return tuple(_told(sequences[index], token, words) for index, token in place[:, order].T.tolist())


def _told(sequence: LoggedSequence, place: int, words: Words | None) -> WorstToken:
    assert sequence.rollout_logprobs is not None
    assert sequence.learner_logprobs is not None
    ids = sequence.token_ids
    text = before = None
    if words is not None and ids[place] >= 0:
        text, before = words([int(ids[place])]), words(ids[max(0, place - BEFORE) : place].tolist())
    rollout, learner = float(sequence.rollout_logprobs[place]), float(sequence.learner_logprobs[place])
    return WorstToken(
        sequence.where,
        place,
        len(sequence),
        int(sequence.drawn[:place].sum()),
        int(ids[place]),
        rollout,
        learner,
        learner - rollout,
        text,
        before,
        _routed_differently(sequence, place),
    )


def _routed_differently(sequence: LoggedSequence, place: int) -> bool | None:
    """Whether the pass that predicted the token chose other experts; the token before it was what was fed."""
    if sequence.routes is None or sequence.learner_routes is None or place == 0:
        return None
    engine, learner = sequence.routes[place - 1], sequence.learner_routes[place - 1]
    known = (engine >= 0).all(-1) & (learner >= 0).all(-1)
    if not known.any():
        return None
    return bool((np.sort(engine, -1) != np.sort(learner, -1)).any(-1)[known].any())
