"""Environments and losses at fault, each in its own way."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence

import psutil
import torch

from keel.algo.losses import LossInputs
from keel.chat.base import Reply
from keel.envs.base import Env, Step
from keel.types import Message, Task

ESCAPE = "\x1b]52;c;cm0gLXJm\x07\x1b[31m"
"""What a terminal must never be sent: here in the text of an error."""


class Fine(Env):
    """One step; the reward is a whim, so that there is something to learn from."""

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(f"t{number}", {}) for number in range(8)]

    def reset(self, task: Task) -> Sequence[Message]:
        return [Message("user", "Go.")]

    def step(self, reply: Reply) -> Step:
        return Step((), reward=float(len(reply.text) % 3), done=True)


class CannotBeMade(Fine):
    def __init__(self) -> None:
        raise ValueError(f"no data at {ESCAPE} with {os.environ.get('PLANTED_API_KEY')}")


class AlwaysFails(Fine):
    def step(self, reply: Reply) -> Step:
        raise ValueError(f"the world broke {ESCAPE} with {os.environ.get('PLANTED_API_KEY')}")


class Leaks(Fine):
    """Tells its key wherever it can: to the model, as a name, and in every other error."""

    def reset(self, task: Task) -> Sequence[Message]:
        self.odd = int(task.id[1:]) % 2
        return [Message("user", f"Use {os.environ['PLANTED_API_KEY']}.")]

    def step(self, reply: Reply) -> Step:
        key = os.environ["PLANTED_API_KEY"]
        if self.odd:
            raise ValueError(f"401 for {key}")
        return Step((), reward=float(len(reply.text) % 3), done=True, metrics={key: 1.0}, reward_parts={key: 1.0})


class Keyed(Fine):
    def __init__(self, *, api_key: str) -> None:
        self.api_key = api_key


def not_an_environment() -> str:
    return "an environment"


def divides_by_zero(inputs: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A fault of code, whose text quotes what it should not."""
    raise ZeroDivisionError(f"{ESCAPE} with {os.environ.get('PLANTED_API_KEY')}")


_calls = 0


def takes_too_much(inputs: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """From its second batch on it wants 4 GiB, of which the system gives one."""
    global _calls  # noqa: PLW0603
    _calls += 1
    if _calls > 1:
        limit = psutil.Process().memory_info().vms + 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        torch.ones(2**30)
    return -inputs.logprobs * inputs.advantages, {}
