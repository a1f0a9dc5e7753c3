"""The protocol of a reward: what a finished episode was worth."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from keel.types import Task, Trajectory


class Reward(Protocol):
    """Called once, after the last turn of an episode that the world did not spoil; added to what `Env.step` gave.

    A plain function runs in a worker thread. If it raises, the episode becomes `env_error`: a score nobody could
    compute is not a score of zero. Options are keyword-only arguments.
    """

    def __call__(self, trajectory: Trajectory, task: Task, /) -> float | Awaitable[float]: ...
