"""An environment: where tasks come from, what the agent sees, what its reply earns.

One instance serves one episode at a time (Keel makes as many as run at once), so state may live on `self`.
`reset` and `step` may be plain or `async`; plain ones run in a worker thread.

    class Guess(Env):
        def tasks(self, split):
            return [Task(id=str(n), data={"n": n}) for n in range(10)]

        def reset(self, task):
            self.n = task.data["n"]
            return [Message("user", "Guess a digit.")]

        def step(self, reply):
            return Step(done=True, reward=float(reply.final == str(self.n)))
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from keel.chat.base import Reply
from keel.rewards.base import Score
from keel.types import Message, Task, ToolSpec, Trajectory, UserFault

Split = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class Step:
    """What follows a reply: messages for the agent, the reward earned by this step (rewards of an episode add up),
    whether the episode is over, and, at the end, whether it was a success (None: judged as reward > 0 is not done)."""

    messages: tuple[Message, ...] = ()
    reward: float = 0.0
    done: bool = False
    success: bool | None = None
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class EnvError(RuntimeError):
    """Raise it where the world failed (a dead sandbox, a lost connection), from an environment, a tool or a reward.

    The episode becomes `env_error` and leaves before group statistics. An environment's other exceptions mean the
    same; a tool's other exceptions are shown to the agent as the tool's answer, which this one never is.
    """


class NoDemonstrationsError(UserFault, NotImplementedError):
    """The environment cannot show how a task is done; says what it would need. Only a warm start depends on it."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A scripted episode: what a good policy would reply, turn by turn, at `task`.

    `replies[i]` are the messages of reply i. The environment itself answers them when the demonstration is played.
    """

    task: Task
    replies: tuple[tuple[Message, ...], ...]


class Env:
    """Base class; subclass it and write `tasks`, `reset` and `step`."""

    def tools(self) -> Sequence[ToolSpec]:
        """Tools shown to the agent in the first prompt."""
        return ()

    def tasks(self, split: Split) -> Sequence[Task]:
        """All tasks of a split; train and eval share none. May be lazy (`__len__` and `__getitem__`)."""
        raise NotImplementedError(f"{type(self).__name__} needs a method tasks(self, split)")

    def reset(self, task: Task) -> Sequence[Message] | Awaitable[Sequence[Message]]:
        """Begin an episode: the first messages."""
        raise NotImplementedError(f"{type(self).__name__} needs a method reset(self, task)")

    def step(self, reply: Reply) -> Step | Awaitable[Step]:
        """Answer the agent's reply (which may be malformed)."""
        raise NotImplementedError(f"{type(self).__name__} needs a method step(self, reply)")

    def judge(self, trajectory: Trajectory, task: Task) -> Score | Awaitable[Score]:  # noqa: ARG002
        """Score a finished episode as a whole, a truncated one too; added to what `step` gave.

        Not asked of demonstrations, whose rewards nobody learns from.
        """
        return Score(0.0)

    def demonstrations(self, count: int, *, seed: int, start: int) -> Sequence[Demonstration]:  # noqa: ARG002
        """Demonstrations number `start` to `start + count - 1` of the endless sequence that `seed` gives.

        At tasks of the train split only; the same numbers always give the same demonstrations. Raises
        NoDemonstrationsError if there are none.
        """
        raise NoDemonstrationsError(
            f"{type(self).__name__} has no demonstrations; write demonstrations(self, count, *, seed, start), "
            "or name a function of that signature in warm_start.demonstrations"
        )

    def close(self) -> None | Awaitable[None]:
        """Free what the instance holds."""
        return None
