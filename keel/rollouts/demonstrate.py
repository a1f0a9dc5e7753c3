"""Scripted demonstrations -> trajectories: the environment answers for real, the chat format writes every token."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from keel.chat.base import Chat
from keel.envs.base import Demonstration, Env, Step
from keel.envs.load import EnvFactory
from keel.rollouts.loop_thread import LoopThread
from keel.rollouts.metrics import rollout_metrics
from keel.rollouts.tokens import TokenRecord
from keel.types import Fault, Group, Message, Trajectory, Turn


class DemonstrationError(Fault, RuntimeError):
    """A demonstration does not work: the chat format cannot read it back, or the environment does not end with it."""


class Demonstrations(Protocol):
    """Demonstrations number `start` to `start + count - 1` of an endless sequence, e.g. `Env.demonstrations`."""

    def __call__(self, count: int, /, *, seed: int, start: int) -> Sequence[Demonstration]: ...


class DemonstrationSource:
    """Groups for the warm start, each of one demonstration. Its position in the sequence is all its state."""

    def __init__(
        self,
        env_factory: EnvFactory,
        chat: Chat,
        *,
        per_step: int,
        seed: int,
        demonstrations: Demonstrations | None = None,
    ) -> None:
        """`demonstrations` is where they come from; None: the environment's own."""
        self._env = env_factory()
        self._chat = chat
        self._per_step = per_step
        self._seed = seed
        self._demonstrations: Callable[..., Sequence[Demonstration]] = demonstrations or self._env.demonstrations
        self._position = 0
        self._metrics: dict[str, float] = {}
        self._closed = False
        # Not the caller's: in a notebook's cell that one is running already.
        self._loop = LoopThread("keel-demonstrations")

    def next_groups(self, step: int) -> list[Group]:
        """The next `per_step` demonstrations; `step` names their groups. Raises DemonstrationError."""
        begin = time.perf_counter()
        found = self._demonstrations(self._per_step, seed=self._seed, start=self._position)
        if len(found) != self._per_step:
            raise DemonstrationError(f"asked for {self._per_step} demonstrations, got {len(found)}")
        trajectories = self._loop.run(self._play(found, step))
        self._position += self._per_step
        groups = [Group(trajectory.group_id, trajectory.task, (trajectory,)) for trajectory in trajectories]
        seconds = time.perf_counter() - begin  # nothing is made ahead, so all of them are waited for
        self._metrics = {**rollout_metrics(groups, seconds), "time/rollout_wait_s": seconds}
        return groups

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics of the step that `next_groups` returned last, as a `Collector`'s."""
        return self._metrics

    def close(self) -> None:
        """Close the environment."""
        if not self._closed:
            self._closed = True
            try:
                self._loop.run(self._close())
            finally:
                self._loop.close()

    async def _close(self) -> None:
        await _result(self._env.close())

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {"position": self._position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was saved."""
        self._position = int(state["position"])

    async def _play(self, found: Sequence[Demonstration], step: int) -> list[Trajectory]:
        return [
            await play(demonstration, self._env, self._chat, group_id=f"demo{step:06d}.{index:03d}")
            for index, demonstration in enumerate(found)
        ]


async def play(demonstration: Demonstration, env: Env, chat: Chat, *, group_id: str) -> Trajectory:
    """Play a demonstration through `env`: its replies become spans of origin "demonstration".

    Raises DemonstrationError if the chat reads a reply back as malformed, or if the environment ends the episode
    before the last reply or not with it; and what the environment raises.
    """
    first = tuple(await _result(env.reset(demonstration.task)))
    tools = env.tools()
    record, history, turns = TokenRecord(), list(first), list[Turn]()
    prompt = chat.start(first, tools)
    record.feed(prompt)
    reward, success = 0.0, None
    for number, messages in enumerate(demonstration.replies):
        place = record.place
        tokens = tuple(
            token
            for index, message in enumerate(messages)
            for token in chat.demonstrate(message, last=index == len(messages) - 1)
        )
        record.demonstrate(tokens)
        reply = chat.parse(tokens)
        if reply.malformed is not None:
            raise _broken(demonstration, number, f"is read back as malformed ({reply.malformed}): {reply.text!r}")
        step: Step = await _result(env.step(reply))
        last = number == len(demonstration.replies) - 1
        if step.done != last:
            raise _broken(demonstration, number, "ends the episode early" if step.done else "does not end the episode")
        observation = tuple(step.messages)
        turns.append(Turn(reply.messages, reply.text, "stop", *place, observation=observation, dropped=prompt.dropped))
        reward += step.reward
        success = success if step.success is None else step.success
        if not last:
            history.extend(reply.messages)
            prompt = chat.extend(record.token_ids, history, step.messages, tools)
            record.feed(prompt)
            history.extend(step.messages)
    return Trajectory(
        demonstration.task, group_id, 0, first, tuple(turns), record.segments(), "completed", reward, success=success
    )


async def _result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _broken(demonstration: Demonstration, number: int, what: str) -> DemonstrationError:
    messages: tuple[Message, ...] = demonstration.replies[number]
    return DemonstrationError(f"demonstration at task {demonstration.task.id}: reply {number} {what}; it is {messages}")
