"""The protocol of a reward: what a finished episode was worth."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from keel.types import Task, Trajectory


@dataclass(frozen=True, slots=True)
class Score:
    """What an episode earned, named parts of it, and whether it was a success (None: leaves what the steps said)."""

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    success: bool | None = None


class RewardError(RuntimeError):
    """A reward could not be computed; the text is complete, with the reward's name. The episode is `env_error`."""


class Reward(Protocol):
    """Called once, after the last turn of an episode that the world did not spoil; added to what `Env.step` gave.

    A plain function runs in a worker thread. If it raises, the episode becomes `env_error`: a score nobody could
    compute is not a score of zero. Options are keyword-only arguments.
    """

    def __call__(self, trajectory: Trajectory, task: Task, /) -> float | Score | Awaitable[float | Score]: ...
