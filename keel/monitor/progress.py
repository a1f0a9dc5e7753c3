"""Where a run is, for whoever asks from outside its thread: a signal handler, the watchdog, an error message.

The loop says what it is about to do (`RunLog.doing`); parts that take long count what they have done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

Phase = Literal["load", "evaluate", "collect", "pack", "score", "backward", "optimizer", "publish", "record", "save"]

WORDS: Mapping[Phase, str] = {
    "load": "loading the model",
    "evaluate": "evaluating",
    "collect": "collecting rollouts",
    "pack": "packing the batch",
    "score": "scoring the batch",
    "backward": "computing the gradient",
    "optimizer": "updating the weights",
    "publish": "giving the engine new weights",
    "record": "writing records",
    "save": "writing a checkpoint",
}


@dataclass(frozen=True, slots=True)
class ChildProcess:
    """A process of the run's own: `stacks` is the file into which it writes its stacks on SIGUSR1."""

    name: str
    pid: int
    stacks: str


@dataclass(frozen=True)
class Watched:
    """What the watchdog may ask of a run's parts: counts that grow while they work, what episodes wait for in words
    ("" if none run), and the run's other processes. All are asked from another thread."""

    counts: Callable[[], tuple[int, ...]] = tuple
    waiting: Callable[[], str] = str
    processes: Callable[[], list[ChildProcess]] = list


class Watch(Protocol):
    """Told what the run begins to do, with a batch of `sizes` if they are new."""

    def enter(self, phase: Phase, **sizes: int) -> None: ...


@dataclass
class Progress:
    """Written by the run's own thread alone. `sizes` are of the batch in work: tokens, sequences."""

    phase: Phase = "load"
    stage: str = ""
    step: int | None = None  # of the stage; None before the first one begins
    num_steps: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    watched: Watched = field(default_factory=Watched)
    moves: int = 0
    since: float = field(default_factory=time.monotonic)

    def enter(self, phase: Phase, **sizes: int) -> None:
        """The run begins to do something else, with a batch of `sizes` if they are new."""
        self.phase = phase
        self.sizes = sizes or self.sizes
        self.moves += 1
        self.since = time.monotonic()

    def begin(self, stage: str, step: int, num_steps: int) -> None:
        """A step of a stage begins."""
        self.stage, self.step, self.num_steps, self.sizes = stage, step, num_steps, {}

    @contextmanager
    def watching(self, watched: Watched) -> Iterator[None]:
        """The run has these parts, as long as the context lasts."""
        self.watched = watched
        try:
            yield
        finally:
            self.watched = Watched()

    @property
    def under_way(self) -> bool:
        """Whether there is a step to finish; before the first one, stopping at once loses nothing."""
        return self.step is not None

    def counts(self) -> tuple[int, ...]:
        """Changes whenever something has moved."""
        return (self.moves, *self.watched.counts())

    def where(self) -> str:
        """ "reinforcement step 13 of 40", or "the beginning"."""
        if self.step is None:
            return "the beginning"
        return f"{self.stage} step {self.step + 1} of {self.num_steps}"

    def told(self) -> str:
        """Where the run is and what it waits for, in one line."""
        waiting = self.watched.waiting() if self.phase in ("collect", "evaluate") else ""
        return f"{self.where()} ({WORDS[self.phase]}{': ' if waiting else ''}{waiting})"
