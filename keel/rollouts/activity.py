"""What episodes are doing right now, for whoever wonders from another thread why nothing happens."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass


@dataclass(slots=True)
class _Wait:
    what: str
    task_id: str
    since: float


class Activity:
    """Written by the event loop of the episodes; `moves` and `waiting` may be read from anywhere."""

    def __init__(self) -> None:
        self.moves = 0
        """Grows whenever an episode gets on."""
        self._waits: dict[str, _Wait] = {}

    def enter(self, episode: str, task_id: str, what: str) -> None:
        """`episode` now waits for `what`: "the engine", "env.step", ..."""
        self.moves += 1
        self._waits[episode] = _Wait(what, task_id, time.monotonic())

    def leave(self, episode: str) -> None:
        """`episode` is over."""
        self.moves += 1
        self._waits.pop(episode, None)

    def waiting(self) -> str:
        """ "3 episodes wait for env.step (the longest 31 s, at task 'x'), 12 for the engine (the longest 2 s)"; "" if
        no episode runs."""
        by_what: dict[str, list[_Wait]] = defaultdict(list)
        for wait in list(self._waits.values()):
            by_what[wait.what].append(wait)
        longest = [(min(waits, key=lambda wait: wait.since), len(waits)) for waits in by_what.values()]
        longest.sort(key=lambda found: found[0].since)
        now = time.monotonic()
        return ", ".join(
            f"{count}{' episode' + 's' * (count > 1) if not index else ''} waiting for {wait.what} "
            f"(the longest {now - wait.since:.0f} s, at task {wait.task_id[:200]!r})"
            for index, (wait, count) in enumerate(longest)
        )
