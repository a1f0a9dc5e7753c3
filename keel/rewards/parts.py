"""What may stand for a reward: a function of (trajectory, task), a built-in's name, a function in TRL's style, several.

TRL's style is recognised by a parameter named `completions`: `(prompts, completions, **columns) -> list of floats`.
Keel asks for one episode at a time, so every list has length 1; a function that compares the completions of a batch
with each other has nothing to compare.
"""

from __future__ import annotations

import inspect
import json
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import PurePath
from typing import Any

from keel import plugins
from keel.chat.base import Reply
from keel.rewards.base import RewardError
from keel.types import Message, Task, Trajectory, Turn, UserFault

RewardLike = str | Callable[..., Any]
Rewards = RewardLike | Sequence[RewardLike | tuple[RewardLike, float]]
_TRL_OWN = ("prompts", "completions", "completion_ids")


class RewardDeclarationError(UserFault, TypeError):
    """Something given as a reward cannot be one; says what, and what a reward looks like."""


@dataclass(frozen=True, slots=True)
class RewardPart:
    """One reward of several: its name, its weight, and `function(trajectory, task)`, plain or async."""

    name: str
    weight: float
    function: Callable[[Trajectory, Task], Any]

    def value(self, returned: Any) -> float:
        """What the function returned, if it is a finite number. Raises RewardError."""
        if not isinstance(returned, Real) or not math.isfinite(returned):
            raise RewardError(f"reward {self.name} returns a finite number; got {_short(returned)}")
        return float(returned)


def as_list(reward: Rewards) -> list[RewardLike | tuple[RewardLike, float]]:
    """One reward, or several, as a list."""
    return list(reward) if isinstance(reward, list | tuple) and not is_weighted(reward) else [reward]  # type: ignore[list-item]


def as_parts(reward: Rewards, *, is_text: Callable[[Task], bool] | None = None) -> tuple[RewardPart, ...]:
    """The parts of a reward, each with a name of its own and its weight (1.0 where none is given).

    `is_text` says of a task whether functions in TRL's style get plain texts; without it they get chats. Raises
    RewardDeclarationError.
    """
    items = as_list(reward)
    if not items:
        raise RewardDeclarationError("reward is an empty list; give at least one, or leave reward out")
    parts = [_part(item, is_text) for item in items]
    names = [part.name for part in parts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RewardDeclarationError(f"two rewards are named {twice[0]!r}; give one function another name")
    return tuple(parts)


def as_reward(
    function: Callable[..., Any], *, is_text: Callable[[Task], bool] | None = None
) -> Callable[[Trajectory, Task], Any]:
    """`function` as `(trajectory, task) -> number`; one in TRL's style is wrapped. Raises RewardDeclarationError."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # something built in that tells nothing of itself
        return function
    if any(parameter.name == "completions" for parameter in parameters):
        return TrlReward(function, is_text=is_text)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    needed = [p for p in positional if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    takes_two = len(positional) >= 2 or any(p.kind is p.VAR_POSITIONAL for p in positional)
    if not takes_two or len(needed) > 2:
        raise RewardDeclarationError(
            f"reward {name_of(function)}{inspect.signature(function)}: a reward is (trajectory, task) -> float, or, in "
            "TRL's style, (prompts, completions, **columns) -> list of floats"
        )
    return function


def failure(name: str, error: BaseException) -> RewardError:
    """The error of a reward's function that raised, with the place in its own file."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({PurePath(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return RewardError(f"reward {name} raised {type(error).__name__}: {error}{place}")


def name_of(function: Any) -> str:
    """The name of a function, of what a `functools.partial` wraps, or of an object's class."""
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__name__", type(inner).__name__))


class TrlReward:
    """A reward function in TRL's style, asked for one episode.

    `prompts` and `completions` are lists of one chat (a list of {"role", "content"}), or of one text; every column of
    the task is a list of one value; `completion_ids` is there for functions that name it. The completion is all that
    followed the prompt, tool calls and answers included; as a text it is the last reply's answer. A reply that could
    not be parsed is passed as the text it is, as TRL does. Unlike TRL, None is not taken for "does not apply".
    """

    def __init__(self, function: Callable[..., Any], *, is_text: Callable[[Task], bool] | None = None) -> None:
        self._function = function
        self._is_text = is_text
        self.__name__ = name_of(function)
        parameters = inspect.signature(function).parameters.values()
        self._takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._names = {parameter.name for parameter in named}
        self.needs = tuple(p.name for p in named if p.default is p.empty and p.name not in _TRL_OWN)

    def __call__(self, trajectory: Trajectory, task: Task) -> Any:
        given = {**{name: [value] for name, value in task.data.items()}, **self._own(trajectory, task)}
        if missing := [name for name in self.needs if name not in given]:
            raise RewardError(
                f"reward {self.__name__} needs {missing[0]!r}, which is no column of the task (it has: "
                f"{', '.join(task.data)}), nor one of {', '.join(_TRL_OWN)}"
            )
        returned = self._function(**{n: v for n, v in given.items() if self._takes_all or n in self._names})
        return self._later(returned) if inspect.isawaitable(returned) else self._only(returned)

    async def _later(self, returned: Any) -> Any:
        return self._only(await returned)

    def _only(self, returned: Any) -> Any:
        values = returned.tolist() if hasattr(returned, "tolist") else returned  # a tensor's or an array's
        if not isinstance(values, list | tuple) or len(values) != 1:
            raise RewardError(f"reward {self.__name__} returns a list of 1 number; got {_short(values)}")
        return values[0]

    def _own(self, trajectory: Trajectory, task: Task) -> dict[str, Any]:
        spans = [span for segment in trajectory.segments for span in segment if span.origin == "policy"]
        ids = [token for span in spans for token in span.token_ids]
        if self._is_text is not None and self._is_text(task):
            prompt: Any = trajectory.prompt[-1].content
            completion: Any = final_text(trajectory.turns[-1]) if trajectory.turns else ""
        else:
            prompt = [_as_chat(message) for message in trajectory.prompt]
            completion = [message for turn in trajectory.turns for message in _turn_as_chat(turn)]
        return {"prompts": [prompt], "completions": [completion], "completion_ids": [ids]}


def final_text(turn: Turn) -> str:
    """The answer of a reply, or, if it gives none or could not be parsed, its text as it is."""
    final = Reply(turn.reply, turn.reply_text, turn.malformed).final
    return turn.reply_text if final is None else final


def _part(item: Any, is_text: Callable[[Task], bool] | None) -> RewardPart:
    reward, weight = item if is_weighted(item) else (item, 1.0)
    if isinstance(reward, str):
        reward = plugins.resolve(reward, "keel.rewards")
    if not callable(reward):
        raise RewardDeclarationError(f"a reward is a function or the name of one; got {_short(reward)}")
    if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
        raise RewardDeclarationError(f"the weight of reward {name_of(reward)} is a finite number; got {_short(weight)}")
    return RewardPart(name_of(reward), float(weight), as_reward(reward, is_text=is_text))


def is_weighted(item: Any) -> bool:
    """Is it a pair (reward, weight)?"""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], int | float)


def _turn_as_chat(turn: Turn) -> list[dict[str, Any]]:
    reply = Reply(turn.reply, turn.reply_text, turn.malformed)
    said: dict[str, Any] = {"role": "assistant", "content": "" if reply.calls else final_text(turn)}
    if reply.calls:
        said["tool_calls"] = [_call(call) for call in reply.calls]
    return [said, *(_as_chat(message) for message in turn.observation)]


def _call(call: Message) -> dict[str, Any]:
    name = (call.recipient or "").removeprefix("functions.")
    return {"type": "function", "function": {"name": name, "arguments": _arguments(call.content)}}


def _arguments(content: str) -> Any:
    """A call's arguments as a mapping, or the text itself where it is none (the policy wrote it)."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return content
    return value if isinstance(value, Mapping) else content


def _as_chat(message: Message) -> dict[str, Any]:
    chat = {"role": message.role, "content": message.content}
    return {**chat, "name": message.name.removeprefix("functions.")} if message.name else chat


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 200 else text[:200] + '...'}"
