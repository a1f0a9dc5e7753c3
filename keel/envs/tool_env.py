"""An environment whose agent may call tools before it answers; subclasses write `tasks`, `reset` and `score`."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

from keel.chat.base import Reply
from keel.envs.base import Env, Step
from keel.envs.tools import Tool, as_tools, call_tool
from keel.types import Message, ToolSpec

OnMalformed = Literal["end", "answer"]


class ToolEnv(Env):
    """Answers tool calls, passes the final answer to `score`, and deals with replies that are neither.

    `on_malformed` "end" ends the episode with `malformed_reward`; "answer" tells the agent what was wrong and goes on.
    `step` is async, so `score` must not block unless it is async itself or quick.
    """

    def __init__(
        self,
        *,
        tools: Sequence[Tool | Callable[..., Any]] = (),
        on_malformed: OnMalformed = "end",
        malformed_reward: float = 0.0,
    ) -> None:
        if on_malformed not in ("end", "answer"):
            raise ValueError(f"on_malformed is 'end' or 'answer'; got {on_malformed!r}")
        self._tools = as_tools(tools)
        self._on_malformed = on_malformed
        self._malformed_reward = malformed_reward

    def tools(self) -> Sequence[ToolSpec]:
        return tuple(made.spec for made in self._tools.values())

    def score(self, answer: str) -> float | Step | Awaitable[float | Step]:
        """Judge the final answer: a reward (1.0 is a success), or a whole Step to say more or to go on."""
        raise NotImplementedError(f"{type(self).__name__} needs a method score(self, answer)")

    async def step(self, reply: Reply) -> Step:
        if reply.malformed is not None:
            return self._refuse(reply.malformed)
        if reply.calls:
            return await self._answer_calls(reply.calls)
        answer = reply.final
        if answer is None:
            return self._refuse("it neither calls a tool nor gives a final answer")
        scored = self.score(answer)
        if inspect.isawaitable(scored):
            scored = await scored
        if isinstance(scored, Step):
            return scored
        return Step(done=True, reward=float(scored), success=scored >= 1.0)

    async def _answer_calls(self, calls: Sequence[Message]) -> Step:
        """Answer calls one after the other, in their order, so that what they do to the world is reproducible."""
        answers = []
        num_errors = 0
        for call in calls:
            assert call.recipient is not None  # that is what makes it a call
            result = await call_tool(self._tools, call.recipient, call.content)
            num_errors += result.error is not None
            answers.append(Message("tool", result.text, channel=call.channel, name=call.recipient))
        metrics = {"tool_calls": float(len(calls)), "tool_errors": float(num_errors)}
        return Step(messages=tuple(answers), metrics=metrics)

    def _refuse(self, reason: str) -> Step:
        if self._on_malformed == "end":
            return Step(done=True, reward=self._malformed_reward, success=False)
        return Step(messages=(Message("user", f"Error: your reply could not be used: {reason}. Reply again."),))
