"""Other tokens, or other positions, than the ones the learner is shown: what an engine or a learner may have read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from keel.preflights.diagnosis_evidence import Evidence, StackFacts
from keel.preflights.reference import Feed

if TYPE_CHECKING:
    from keel.preflights.stack import ProbeSequence

Tokens = tuple[int, ...]
WHOLE = ("pads", "without_first", "gap", "stretched", "without_ends")
"""Readings under which a sequence stays one, from the first token to the last."""


@dataclass(frozen=True)
class Reading:
    """One way of reading a sequence otherwise.

    "pads": `value` tokens `token` stand before it, and are seen; "gap": positions jump by `value` at the first drawn
    token; "stretched": positions are multiplied by `value`; "without_first": the first `value` tokens are missing;
    "without_last": the last `value` tokens of the context before each reply; "without_stop": the stop tokens of earlier
    replies; "without_ends": the last tokens of replies that the learner tells nothing of; "retokenized": earlier
    replies are decoded and encoded again; "forgotten": earlier replies and what came before them are missing;
    "routes": the side's own choice of experts (`token` 0: the engine's, 1: the learner's).
    """

    kind: str
    value: int = 1
    token: int = 0


def together(first: Reading, second: Reading) -> bool:
    """Can a sequence be read in both ways at once, and say two things?"""
    alone = ("routes", "without_ends")
    return first.kind != second.kind and first.kind not in alone and second.kind not in alone


def readable(reading: Reading, evidence: Evidence, facts: StackFacts) -> bool:
    """Does `reading` say anything else than what was shown, for any sequence?"""
    if reading.kind == "without_ends":
        return any(evidence.lost_ends(index) for index in range(len(evidence.sequences)))
    for sequence in evidence.sequences:
        shown = tuple(int(token) for token in sequence.token_ids)
        if any(
            feed.positions is not None or feed.token_ids != shown[:stop]
            for feed, _, stop in _feeds((reading,), sequence, facts)
        ):
            return True
    return False


def read_otherwise(readings: Sequence[Reading], evidence: Evidence, facts: StackFacts) -> tuple[list[Feed], list[int]]:
    """Feeds of all replies, and for each of their wanted rows its place in the rows of `Evidence.feeds`.

    Of several `readings` any two must be possible `together`.
    """
    feeds, targets, first = [], [], 0
    whole = all(reading.kind in WHOLE for reading in readings)
    for index, sequence in enumerate(evidence.sequences):
        places = evidence.places(sequence)
        if readings[0].kind == "without_ends":
            feed, told = _without(sequence, evidence.lost_ends(index))
            feeds.append(feed)
            targets += [first + places.index(place) for place in told]
            first += len(places)
            continue
        row_of = {place: first + row for row, place in enumerate(places)}
        for feed, start, _ in _feeds(readings, sequence, facts):
            feeds.append(feed)
            own = range(start, start + len(feed.wanted))
            targets += [row_of[place] for place in (places if whole else own)]
        first += len(places)
    return feeds, targets


def _feeds(readings: Sequence[Reading], sequence: ProbeSequence, facts: StackFacts) -> Iterator[tuple[Feed, int, int]]:
    """For each reply what was fed for it, where its first token stands in the sequence, and where it stops."""
    shown = tuple(int(token) for token in sequence.token_ids)
    if all(reading.kind in WHOLE for reading in readings):
        yield _whole(readings, sequence, shown)
        return
    before, missing = _in_front(readings, sequence)
    for number, reply in enumerate(sequence.replies):
        context = before + _context(readings, sequence, shown, number, facts)[missing:] or shown[:1]
        tokens = context + shown[reply.start : reply.stop]
        wanted = tuple(range(len(context) - 1, len(tokens) - 1))
        first_reply = min(sequence.replies[0].start + len(before) - missing, len(context))
        yield Feed(tokens, wanted, _positions(readings, first_reply, len(tokens))), reply.start, reply.stop


def _in_front(readings: Sequence[Reading], sequence: ProbeSequence) -> tuple[Tokens, int]:
    """What stands before the sequence, and how many of its first tokens are missing."""
    before: Tokens = ()
    missing = 0
    for reading in readings:
        if reading.kind == "pads":
            before = (reading.token,) * reading.value
        elif reading.kind == "without_first":
            missing = min(reading.value, sequence.replies[0].start - 1)
    return before, missing


def _context(
    readings: Sequence[Reading], sequence: ProbeSequence, shown: Tokens, number: int, facts: StackFacts
) -> Tokens:
    start = sequence.replies[number].start
    forgotten = number > 0 and any(reading.kind == "forgotten" for reading in readings)
    done = sequence.replies[number - 1].stop if forgotten else 0
    parts: list[int] = []
    for reply in () if forgotten else sequence.replies[:number]:
        again = shown[reply.start : reply.stop]
        for reading in readings:
            again = _again(reading, again, facts)
        parts += [*shown[done : reply.start], *again]
        done = reply.stop
    context = (*parts, *shown[done:start])
    lost = sum(reading.value for reading in readings if reading.kind == "without_last")
    return context[: max(0, len(context) - lost)]


def _whole(readings: Sequence[Reading], sequence: ProbeSequence, shown: Tokens) -> tuple[Feed, int, int]:
    start = sequence.replies[0].start
    before, missing = _in_front(readings, sequence)
    tokens = before + shown[missing:]
    moved = len(before) - missing
    places = [reply_place for each in sequence.replies for reply_place in range(each.start, each.stop)]
    wanted = tuple(place + moved - 1 for place in places)
    return Feed(tokens, wanted, _positions(readings, start + moved, len(tokens))), start, len(shown)


def _without(sequence: ProbeSequence, lost: list[int]) -> tuple[Feed, list[int]]:
    """The sequence without the tokens at `lost`, and the drawn places whose rows are wanted."""
    kept = [place for place in range(len(sequence)) if place not in lost]
    told = [place for place in kept if sequence.drawn[place]]
    row_of = {place: row for row, place in enumerate(kept)}
    tokens = tuple(int(sequence.token_ids[place]) for place in kept)
    return Feed(tokens, tuple(row_of[place] - 1 for place in told)), told


def _again(reading: Reading, reply: Tokens, facts: StackFacts) -> Tokens:
    """An earlier reply as it is read in a later turn."""
    if reading.kind == "without_stop":
        return reply[:-1] if reply[-1:] and reply[-1] in facts.stop_token_ids else reply
    if reading.kind == "retokenized" and facts.tokenizer is not None:
        return tuple(facts.tokenizer.encode(facts.tokenizer.decode(list(reply))))
    return reply


def _positions(readings: Sequence[Reading], first_reply: int, length: int) -> Tokens | None:
    places: Tokens | None = None
    for reading in readings:
        if reading.kind == "gap":
            places = tuple(
                place + reading.value * (index >= first_reply) for index, place in enumerate(places or range(length))
            )
        elif reading.kind == "stretched":
            places = tuple(place * reading.value for place in places or range(length))
    return places
