"""What a log says of the gap, whoever wrote it: sequences of tokens, and what either side gave each drawn one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from keel.types import UserFault

Array = npt.NDArray[Any]

__all__ = ["GapLog", "GapLogError", "LoggedSequence"]

ENGINE, LEARNER = "rollout_logprobs", "learner_logprobs"
"""The two streams by the names they have here; every reader says what its log calls them."""
POSITIVE = 1e-3
"""A log-prob is at most 0; one that was made as a difference in low precision may come out this far above."""


class GapLogError(UserFault, ValueError):
    """A log cannot be read, or is no log of a gap: names file and field, what was got and how to mend it."""


@dataclass(frozen=True)
class LoggedSequence:
    """One sequence of n tokens, prompt included where the log has it. Index i of every stream speaks of token i.

    `drawn` says which tokens the policy drew and the learner learns from; only those are compared. A side that the log
    does not have is None. `trajectory` is equal for sequences of one episode. `temperature` is what the engine drew
    with, where the log says so; the log-probs of both sides are taken to be after it.
    """

    where: str  # file and place in it, for messages
    trajectory: str
    token_ids: Array  # [n] int64; -1 where the log does not say
    drawn: Array  # [n] bool
    rollout_logprobs: Array | None = None  # [n] float, about drawn tokens; anything elsewhere
    learner_logprobs: Array | None = None  # [n] float, likewise
    temperature: Array | None = None  # [n] float
    routes: Array | None = None  # [n, layers, k] int, the engine's choices when token i was fed; -1 unknown
    learner_routes: Array | None = None  # [n, layers, k] int, the learner's
    identity: str = ""  # equal in all the files that hold the same sample; "" where a sample is in one alone

    def __len__(self) -> int:
        return len(self.token_ids)

    def check(self) -> None:
        """Raise GapLogError for streams of unequal length and for what is no log-prob of a drawn token."""
        for name in ("drawn", ENGINE, LEARNER, "temperature", "routes", "learner_routes"):
            stream = getattr(self, name)
            if stream is not None and len(stream) != len(self.token_ids):
                raise GapLogError(
                    f"{self.where}: {name} has {len(stream)} entries for {len(self.token_ids)} tokens; the streams of "
                    "a sequence are aligned, one entry a token"
                )
        for name in (ENGINE, LEARNER):
            stream = getattr(self, name)
            if stream is not None:
                self._check_logprobs(name, stream)

    def _check_logprobs(self, name: str, stream: Array) -> None:
        bad = self.drawn & ~(np.isfinite(stream) & (stream <= POSITIVE))
        if not bad.any():
            return
        place = int(np.flatnonzero(bad)[0])
        value = float(stream[place])
        fix = "a log-prob is at most 0; are these probabilities, or shifted?"
        if not np.isfinite(value):
            fix = "the log-prob of a drawn token is a finite number; that side's pass went wrong there, or did not run"
        raise GapLogError(f"{self.where}: {name} of token {place} is {value} ({int(bad.sum())} such tokens); {fix}")


@dataclass(frozen=True)
class GapLog:
    """The sequences of one or more files, all of them checked. `kind` is what they were read as, in words.

    `missing` has for each side that a sequence lacks how that kind of log can be made to have it; `notes` what a reader
    has to know of the figures.
    """

    kind: str
    sequences: tuple[LoggedSequence, ...]
    missing: tuple[tuple[str, str], ...] = ()  # (ENGINE or LEARNER, how to record it)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for sequence in self.sequences:
            sequence.check()

    def lacks(self, side: str) -> bool:
        """Whether any sequence with drawn tokens has nothing from `side` (ENGINE or LEARNER)."""
        return any(getattr(each, side) is None for each in self.sequences if each.drawn.any())

    def how_to_record(self, side: str) -> str:
        """How a log of this kind can be made to have `side`; "" if nobody knows."""
        return " ".join(dict.fromkeys(text for name, text in self.missing if name == side))


def joined(logs: list[GapLog]) -> GapLog:
    """Several logs as one, in the order given."""
    kinds = dict.fromkeys(log.kind for log in logs)
    return GapLog(
        ", ".join(kinds),
        tuple(sequence for log in logs for sequence in log.sequences),
        tuple(dict.fromkeys(each for log in logs for each in log.missing)),
        tuple(dict.fromkeys(note for log in logs for note in log.notes)),
    )


def placed(values: Any, where: Array, *, name: str, of: str) -> Array:
    """[n] float64 `values` where `where [n]` is true, 0 elsewhere. Raises GapLogError if they do not fit."""
    found = numbers(values, name=name, of=of)
    if len(found) != int(where.sum()):
        raise GapLogError(f"{of}: {name} has {len(found)} entries, {int(where.sum())} tokens need one")
    spread = np.zeros(len(where))
    spread[where] = found
    return spread


def numbers(values: Any, *, name: str, of: str) -> Array:
    """[n] float64; null becomes NaN, so that the check tells of it only where it matters. Raises GapLogError."""
    try:
        if hasattr(values, "detach"):
            values = values.detach().cpu().double().numpy()
        found = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise GapLogError(f"{of}: {name} is no list of numbers: {error}") from error
    if found.ndim != 1:
        raise GapLogError(f"{of}: {name} has shape {found.shape}; one number a token")
    return found


def whole_numbers(values: Any, *, name: str, of: str) -> Array:
    """[n] int64, for token ids and masks. Raises GapLogError for anything that is not whole."""
    found = numbers(values, name=name, of=of)
    if not np.all(np.isfinite(found)) or np.any(found != np.floor(found)):
        raise GapLogError(f"{of}: {name} holds what is no whole number")
    return found.astype(np.int64)
