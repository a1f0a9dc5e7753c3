"""Which tasks a step gets: every epoch a new shuffle, made of the seed alone, walked through step by step."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from keel.types import Task, UserFault


class ScheduleError(UserFault, ValueError):
    """Tasks and saved position do not belong together; says what, got and how to fix."""


class TaskSchedule:
    """Tasks of each step in turn; the position is all its state.

    Epoch e is a shuffle made of (seed, e); a step that reaches the end of an epoch goes on in the next.
    """

    def __init__(self, tasks: Sequence[Task], *, per_step: int, seed: int) -> None:
        if len(tasks) == 0:
            raise ScheduleError("the environment has no tasks to train on; tasks('train') came back empty")
        self._tasks = tasks
        self._per_step = per_step
        self._seed = seed
        self._next_step = 0
        self._position = 0
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    @property
    def next_step(self) -> int:
        return self._next_step

    def peek(self, step: int) -> list[Task]:
        """The tasks of `step`, which is the next one or a later one."""
        if step < self._next_step:
            raise ScheduleError(f"step {step} has been rolled out already; the next one is {self._next_step}")
        start = self._position + (step - self._next_step) * self._per_step
        return [self._at(position) for position in range(start, start + self._per_step)]

    def require(self, step: int) -> None:
        """Raise ScheduleError unless `step` is the next one."""
        if step != self._next_step:
            raise ScheduleError(
                f"asked for the groups of step {step}, but the next one is {self._next_step}; a resumed run must "
                "restore the state that was saved with its checkpoint"
            )

    def advance(self) -> None:
        """Count the next step as done."""
        self._next_step += 1
        self._position += self._per_step

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"next_step": self._next_step, "position": self._position, "tasks": self._fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was saved. Raises ScheduleError if it was saved with other tasks."""
        if state["tasks"] != self._fingerprint:
            raise ScheduleError(
                f"the checkpoint was made with other tasks (theirs: {state['tasks']}, now: {self._fingerprint}); "
                "resume with the environment options and library versions of the run"
            )
        self._next_step = int(state["next_step"])
        self._position = int(state["position"])

    @functools.cached_property
    def _fingerprint(self) -> str:
        """Number of tasks, and a hash of at most 256 ids spread over them (tasks may be lazy, and many)."""
        stride = max(1, len(self._tasks) // 256)
        ids = "\n".join(self._tasks[i].id for i in range(0, len(self._tasks), stride))
        return f"{len(self._tasks)}-{blake2b(ids.encode('utf-8', 'surrogatepass'), digest_size=8).hexdigest()}"

    def _at(self, position: int) -> Task:
        epoch, place = divmod(position, len(self._tasks))
        return self._tasks[self._order(epoch)[place]]

    def _shuffle(self, epoch: int) -> list[int]:
        digest = blake2b(f"tasks/{self._seed}/{epoch}".encode(), digest_size=8).digest()
        order = list(range(len(self._tasks)))
        random.Random(int.from_bytes(digest, "big")).shuffle(order)
        return order
