"""Calls, answers and malformed replies, as the base class of tool environments deals with them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from keel.chat.base import Reply
from keel.envs.base import Env, Step
from keel.envs.tool_env import ToolEnv
from keel.types import Message, Task


def double(number: int) -> int:
    """Double."""
    return 2 * number


class Doubling(ToolEnv):
    def tasks(self, split: str) -> Sequence[Task]:
        return [Task("one")]

    def reset(self, task: Task) -> Sequence[Message]:
        return [Message("user", "Double 4.")]

    async def score(self, answer: str) -> float:
        return float(answer == "8")


def call(name: str, arguments: str) -> Message:
    return Message("assistant", arguments, channel="commentary", recipient=name)


def step(env: ToolEnv, *messages: Message, malformed: str | None = None) -> Step:
    return asyncio.run(env.step(Reply(messages, "", malformed)))


def test_calls_are_answered_in_order_under_the_name_they_were_made() -> None:
    found = step(Doubling(tools=[double]), call("functions.double", '{"number": 4}'), call("functions.half", "{}"))
    assert not found.done
    assert found.messages == (
        Message("tool", "8", channel="commentary", name="functions.double"),
        Message(
            "tool",
            "Error: there is no tool 'functions.half'; known tools: functions.double.",
            channel="commentary",
            name="functions.half",
        ),
    )
    assert found.metrics == {"tool_calls": 2.0, "tool_errors": 1.0}


@pytest.mark.parametrize(("answer", "reward"), [("8", 1.0), ("7", 0.0)])
def test_the_final_answer_is_scored(answer: str, reward: float) -> None:
    found = step(Doubling(), Message("assistant", answer, channel="final"))
    assert found == Step(done=True, reward=reward, success=reward == 1.0)


def test_a_malformed_reply_ends_the_episode_or_is_answered() -> None:
    ended = step(Doubling(malformed_reward=-0.5), malformed="no channel")
    assert ended == Step(done=True, reward=-0.5, success=False)
    answered = step(Doubling(on_malformed="answer"), malformed="no channel")
    assert not answered.done
    assert "no channel" in answered.messages[0].content


def test_a_reply_without_call_or_answer_is_treated_as_malformed() -> None:
    thought = Message("assistant", "8", channel="analysis")
    assert step(Doubling(), thought) == Step(done=True, reward=0.0, success=False)


def test_a_malformed_reply_is_never_scored_or_called_even_if_part_of_it_reads_well() -> None:
    right = Message("assistant", "8", channel="final")
    assert step(Doubling(tools=[double]), right, malformed="trailing tokens").reward == 0.0
    assert step(Doubling(tools=[double]), call("functions.double", '{"number": 4}'), malformed="cut").done


def test_unknown_option_values_are_refused() -> None:
    with pytest.raises(ValueError, match="on_malformed"):
        Doubling(on_malformed="ignore")  # type: ignore[arg-type]


def test_the_base_class_says_what_to_write() -> None:
    with pytest.raises(NotImplementedError, match="demonstrations"):
        Doubling().demonstrations(1, seed=0, start=0)
    with pytest.raises(NotImplementedError, match="tasks"):
        Env().tasks("train")
