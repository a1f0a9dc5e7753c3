"""Rewards that look at the final answer."""

from __future__ import annotations

import pytest

from keel.rewards import exact_match
from keel.rewards.answers import final_answer
from keel.types import Message, Task, Trajectory, Turn

TASK = Task("t", {"answer": "42", "word": " Keel "})


def trajectory(*turns: Turn) -> Trajectory:
    return Trajectory(TASK, "g", 0, (), turns, (), "completed")


def turn(text: str, *, channel: str = "final", recipient: str | None = None, malformed: str | None = None) -> Turn:
    reply = (Message("assistant", text, channel=channel, recipient=recipient),)
    return Turn(reply, text, "stop", 0, 0, malformed)


@pytest.mark.parametrize(
    ("last", "answer"),
    [
        (turn("42"), "42"),
        (turn("42", malformed="no end"), None),
        (turn("42", channel="analysis"), None),
        (turn("42", channel="commentary", recipient="functions.f"), None),
    ],
)
def test_the_final_answer_is_that_of_the_last_turn(last: Turn, answer: str | None) -> None:
    assert final_answer(trajectory(turn("41"), last)) == answer
    assert final_answer(trajectory()) is None


def test_exact_match() -> None:
    assert exact_match(trajectory(turn(" 42\n")), TASK) == 1.0
    assert exact_match(trajectory(turn("420")), TASK) == 0.0
    assert exact_match(trajectory(), TASK) == 0.0
    assert exact_match(trajectory(turn("keel")), TASK, answer_key="word") == 0.0
    assert exact_match(trajectory(turn("keel")), TASK, answer_key="word", ignore_case=True) == 1.0
    with pytest.raises(KeyError, match="answer_key"):
        exact_match(trajectory(), TASK, answer_key="solution")
