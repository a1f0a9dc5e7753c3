"""Other tokens, or other positions, than the ones the learner is shown: what an engine or a learner may have read."""

from __future__ import annotations

from collections.abc import Iterator
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


def readable(reading: Reading, evidence: Evidence, facts: StackFacts) -> bool:
    """Does `reading` say anything else than what was shown, for any sequence?"""
    if reading.kind == "without_ends":
        return any(evidence.lost_ends(index) for index in range(len(evidence.sequences)))
    for sequence in evidence.sequences:
        shown = tuple(int(token) for token in sequence.token_ids)
        if any(
            feed.positions is not None or feed.token_ids != shown[:stop]
            for feed, _, stop in _feeds(reading, sequence, facts)
        ):
            return True
    return False


def read_otherwise(reading: Reading, evidence: Evidence, facts: StackFacts) -> tuple[list[Feed], list[int]]:
    """Feeds of all replies, and for each of their wanted rows its place in the rows of `Evidence.feeds`."""
    feeds, targets, first = [], [], 0
    for index, sequence in enumerate(evidence.sequences):
        places = evidence.places(sequence)
        if reading.kind == "without_ends":
            feed, told = _without(sequence, evidence.lost_ends(index))
            feeds.append(feed)
            targets += [first + places.index(place) for place in told]
            first += len(places)
            continue
        row_of = {place: first + row for row, place in enumerate(places)}
        for feed, start, _ in _feeds(reading, sequence, facts):
            feeds.append(feed)
            own = range(start, start + len(feed.wanted))
            targets += [row_of[place] for place in (places if reading.kind in WHOLE else own)]
        first += len(places)
    return feeds, targets


def _feeds(reading: Reading, sequence: ProbeSequence, facts: StackFacts) -> Iterator[tuple[Feed, int, int]]:
    """For each reply what was fed for it, where its first token stands in the sequence, and where it stops."""
    shown = tuple(int(token) for token in sequence.token_ids)
    if reading.kind in WHOLE:
        yield _whole(reading, sequence, shown)
        return
    for number, reply in enumerate(sequence.replies):
        context = _context(reading, sequence, shown, number, facts)
        tokens = context + shown[reply.start : reply.stop]
        first = len(context)
        if first == 0:
            context, tokens, first = shown[:1], shown[:1] + tokens, 1
        wanted = tuple(range(first - 1, len(tokens) - 1))
        yield Feed(tokens, wanted, _positions(reading, sequence, len(tokens))), reply.start, reply.stop


def _context(reading: Reading, sequence: ProbeSequence, shown: Tokens, number: int, facts: StackFacts) -> Tokens:
    start = sequence.replies[number].start
    if reading.kind == "without_last":
        return shown[: start - reading.value]
    if reading.kind == "forgotten":
        return shown[sequence.replies[number - 1].stop : start] if number else shown[:start]
    parts: list[int] = []
    done = 0
    for reply in sequence.replies[:number]:
        parts += [*shown[done : reply.start], *_again(reading, shown[reply.start : reply.stop], facts)]
        done = reply.stop
    return (*parts, *shown[done:start])


def _whole(reading: Reading, sequence: ProbeSequence, shown: Tokens) -> tuple[Feed, int, int]:
    start = sequence.replies[0].start
    before = (reading.token,) * reading.value if reading.kind == "pads" else ()
    missing = min(reading.value, start - 1) if reading.kind == "without_first" else 0
    tokens = before + shown[missing:]
    moved = len(before) - missing
    places = [reply_place for each in sequence.replies for reply_place in range(each.start, each.stop)]
    wanted = tuple(place + moved - 1 for place in places)
    return Feed(tokens, wanted, _positions(reading, sequence, len(tokens))), start, len(shown)


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


def _positions(reading: Reading, sequence: ProbeSequence, length: int) -> Tokens | None:
    if reading.kind == "gap":
        start = sequence.replies[0].start
        return tuple(place + reading.value * (place >= start) for place in range(length))
    if reading.kind == "stretched":
        return tuple(place * reading.value for place in range(length))
    return None
