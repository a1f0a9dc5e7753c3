"""Rewards that look at the final answer."""

from __future__ import annotations

from keel.chat.base import Reply
from keel.types import Task, Trajectory


def final_answer(trajectory: Trajectory) -> str | None:
    """The final answer of the last turn; None if it was malformed, or a tool call, or if there was no turn."""
    if not trajectory.turns:
        return None
    last = trajectory.turns[-1]
    return Reply(last.reply, last.reply_text, last.malformed).final


def exact_match(trajectory: Trajectory, task: Task, *, answer_key: str = "answer", ignore_case: bool = False) -> float:
    """1.0 if the final answer equals `task.data[answer_key]`, white space at the ends aside, else 0.0.

    Raises KeyError if the task has no such entry.
    """
    if answer_key not in task.data:
        raise KeyError(f"exact_match: task {task.id} has no {answer_key!r}, it has {sorted(task.data)}; set answer_key")
    answer = final_answer(trajectory)
    expected = str(task.data[answer_key]).strip()
    if answer is None:
        return 0.0
    answer = answer.strip()
    return float(answer.lower() == expected.lower() if ignore_case else answer == expected)
