"""Episodes of one recorded step as the page reads them: what was said, and beside it every token.

    STEP = {"groups": [{"group_id", "task_id", "task_text", "num_trajectories", "trajectories": [TRAJECTORY, ..]}],
            "num_trajectories": 256, "left_out": 240}
    TRAJECTORY = {"trajectory": 12, "group", "attempt", "status", "failed", "success", "reward", "reward_parts",
                  "error", "num_tokens", "num_policy_tokens", "metrics", "messages": [MESSAGE, ..],
                  "tokens": TOKENS or null, "tokens_note": text or null}
    MESSAGE = {"role", "channel", "recipient", "name", "content", "turn", "by": "policy" | "context",
               "malformed": text or null, "finish_reason": text or null}

`trajectory` counts the attempts of the step in file order, those that the world spoilt included; "137/12" in links is
step/trajectory. The task's messages have turn null; a reply and what answered it share theirs. A reply that could not
be read has one message that holds its raw text, and says why in `malformed`. `num_trajectories` of a group or step may
be more than are listed: the rest was left out for size. TOKENS is described in `keel.report.tokens`; where it is null
`tokens_note` says why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from keel.monitor.rows import RunDirectoryError
from keel.report import wholeness
from keel.report.plain import cut, number, plain
from keel.report.tokens import TokenText, token_streams
from keel.runs import Run, SequenceView, StepRecord
from keel.secrecy import scrubbed, scrubbed_values
from keel.types import Message, Trajectory

Json = dict[str, Any]
MAX_MESSAGES = 400


@dataclass(frozen=True)
class RecordedStep:
    """Both halves of a step: `trajectories` in file order, `record` with the token streams (None: not readable)."""

    number: int
    trajectories: Sequence[Trajectory]
    record: StepRecord | None

    @cached_property
    def groups(self) -> list[tuple[str, list[int]]]:
        """Group ids in file order, each with the indices of its trajectories."""
        found: dict[str, list[int]] = {}
        for index, trajectory in enumerate(self.trajectories):
            found.setdefault(str(trajectory.group_id), []).append(index)
        return list(found.items())

    @cached_property
    def is_matched(self) -> bool:
        """Do the record's trajectories number the attempts that the world did not spoil, with the same rewards?

        If so, no failed attempt entered the batch, and each has its tokens.
        """
        if self.record is None:
            return False
        rewards = self.record.streams["rewards"]
        kept = [self.trajectories[index].reward for index in self.kept]
        return len(kept) == len(rewards) and bool(np.allclose(np.asarray(kept, dtype=np.float64), rewards, rtol=1e-5))

    @cached_property
    def kept(self) -> list[int]:
        """Indices of the attempts that the world did not spoil: the record's trajectories, in its order."""
        return [index for index, trajectory in enumerate(self.trajectories) if not trajectory.failed]

    @cached_property
    def sequences(self) -> dict[int, list[SequenceView]]:
        """Trajectory index -> its sequences in the record; empty if the two halves do not fit each other."""
        if self.record is None or not self.is_matched:
            return {}
        found: dict[int, list[SequenceView]] = {}
        for view in self.record.sequences:
            found.setdefault(self.kept[view.trajectory], []).append(view)
        return found


def read_step(run: Run, step: int) -> RecordedStep | None:
    """A recorded step, or None if neither half can be read. What cannot be is told of in `run.problems`."""
    trajectories: list[Trajectory] = []
    record: StepRecord | None = None
    try:
        trajectories = run.trajectories(step)
        wholeness.check_trajectories(trajectories, f"trajectories of step {step}")
    except (RunDirectoryError, ValueError) as error:
        _tell(run, error)
        return None
    try:
        record = run.step(step)
        wholeness.check_record(record, f"record of step {step}")
    except (RunDirectoryError, ValueError, TypeError, KeyError) as error:
        _tell(run, error)
        record = None
    return RecordedStep(step, trajectories, record) if trajectories else None


def trajectory_json(step: RecordedStep, index: int, words: TokenText | None, *, with_tokens: bool = True) -> Json:
    """TRAJECTORY `index` of the step; `words` spells tokens (None: their text is not known)."""
    trajectory = step.trajectories[index]
    views = step.sequences.get(index, [])
    found: Json = {
        "trajectory": index,
        "group": cut(str(trajectory.group_id), 200),
        "attempt": trajectory.attempt,
        "status": cut(str(trajectory.status), 40),
        "failed": trajectory.failed,
        "success": trajectory.success if isinstance(trajectory.success, bool) else None,
        "reward": None if trajectory.failed else number(trajectory.reward),
        "reward_parts": plain(dict(trajectory.reward_parts)),
        "error": cut(scrubbed(trajectory.error), 4_000) if isinstance(trajectory.error, str) else None,
        "num_tokens": sum(len(view.streams["labels"]) + 1 for view in views) or None,
        "num_policy_tokens": sum(int((view.streams["policy_version"] >= 0).sum()) for view in views) or None,
        "metrics": plain(dict(trajectory.metrics)),
        "messages": messages_json(trajectory),
        "tokens": None,
        "tokens_note": None,
    }
    if trajectory.failed:
        found["tokens_note"] = "The world spoilt this attempt: it left before the batch, and its tokens with it."
    elif not views:
        found["tokens_note"] = "No token streams were recorded for this attempt, or they cannot be read."
    elif with_tokens:
        found["tokens"] = token_streams(views, words)
    else:
        found["tokens_note"] = "The tokens were left out of this page for size; keel report --serve shows them."
    return found


def messages_json(trajectory: Trajectory) -> list[Json]:
    """MESSAGEs of a trajectory in order: the task's, then each reply and what answered it."""
    found = [_message(message, None, "context") for message in trajectory.prompt]
    for turn, exchange in enumerate(trajectory.turns):
        reply = [_message(message, turn, "policy") for message in exchange.reply]
        if not reply or exchange.malformed is not None:
            reply = [_message(Message("assistant", exchange.reply_text), turn, "policy")]
        for entry in reply:
            entry |= {
                "malformed": None if exchange.malformed is None else cut(str(exchange.malformed), 2_000),
                "finish_reason": cut(str(exchange.finish_reason), 40),
            }
        found += reply
        found += [_message(message, turn, "context") for message in exchange.observation]
    if len(found) > MAX_MESSAGES:
        left_out = Message("system", f"[... {len(found) - MAX_MESSAGES:,} messages left out of this page ...]")
        found = [*found[: MAX_MESSAGES - 1], _message(left_out, None, "context"), found[-1]]
    scrubbed: list[Json] = scrubbed_values(found)
    return scrubbed


def task_text(trajectory: Trajectory) -> str:
    """A task in a line or two: the last message of a user, or its data."""
    asked = [message.content for message in trajectory.prompt if message.role == "user"]
    return cut(scrubbed(str(asked[-1]) if asked else json.dumps(plain(dict(trajectory.task.data)))), 2_000)


def step_json(step: RecordedStep, words: TokenText | None, shown: Mapping[int, Json] | None = None) -> Json:
    """STEP with the trajectories in `shown` (index -> TRAJECTORY), or with all."""
    if shown is None:
        shown = {index: trajectory_json(step, index, words) for index in range(len(step.trajectories))}
    groups = []
    for group_id, indices in step.groups:
        listed = [shown[index] for index in indices if index in shown]
        if listed:
            first = step.trajectories[indices[0]]
            groups.append(
                {
                    "group_id": cut(group_id, 200),
                    "task_id": cut(str(first.task.id), 200),
                    "task_text": task_text(first),
                    "num_trajectories": len(indices),
                    "trajectories": listed,
                }
            )
    total = len(step.trajectories)
    return {"groups": groups, "num_trajectories": total, "left_out": total - len(shown)}


def _message(message: Message, turn: int | None, by: str) -> Json:
    return {
        "role": cut(str(message.role), 40),
        "channel": _short(message.channel),
        "recipient": _short(message.recipient),
        "name": _short(message.name),
        "content": cut(str(message.content)),
        "turn": turn,
        "by": by,
        "malformed": None,
        "finish_reason": None,
    }


def _short(value: Any) -> str | None:
    return None if value is None else cut(str(value), 200)


def _tell(run: Run, error: Exception) -> None:
    problem = cut(str(error).splitlines()[0] if str(error) else type(error).__name__, 300)
    if problem not in run.problems:
        run.problems.append(problem)
