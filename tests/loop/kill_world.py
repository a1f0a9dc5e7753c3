"""A world for runs that get killed: small, quick to learn to call a tool in, and every reply earns something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

import torch

from keel.algo.losses import LossInputs
from keel.chat.base import Reply
from keel.envs.base import Demonstration, Split, Step
from keel.envs.tool_env import ToolEnv
from keel.types import Message, Task


def press() -> str:
    """Press."""
    return "on"


class Buttons(ToolEnv):
    """Press the button, then name it. Part of the reward is a whim of the reply's text, so that attempts of
    a model which has learned next to nothing still differ and every step has a gradient."""

    def __init__(self) -> None:
        super().__init__(tools=(press,))

    def tasks(self, split: Split) -> Sequence[Task]:
        numbers = range(10) if split == "eval" else range(10, 30)
        return [Task(f"button {number}", {"button": number}) for number in numbers]

    async def reset(self, task: Task) -> Sequence[Message]:
        self.task = task
        return [Message("user", f"{task.data['button']}")]

    def score(self, answer: str) -> float:
        return float(answer == str(self.task.data["button"]))

    async def step(self, reply: Reply) -> Step:
        step = await super().step(reply)
        whim = blake2b(f"{self.task.id}/{reply.text}".encode(), digest_size=1).digest()[0] % 4 / 8
        return replace(step, reward=step.reward + whim)

    def demonstrations(self, count: int, *, seed: int, start: int) -> Sequence[Demonstration]:
        tasks = self.tasks("train")
        return [_demonstration(tasks[(seed + 7 * number) % len(tasks)]) for number in range(start, start + count)]


def _demonstration(task: Task) -> Demonstration:
    button = task.data["button"]
    call = Message(
        "assistant",
        "{}",
        channel="commentary",
        recipient="functions.press",
        content_type="json",
    )
    return Demonstration(task, ((call,), (Message("assistant", str(button), channel="final"),)))


def broken(inputs: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss that is never a number."""
    return inputs.logprobs * float("nan"), {}
