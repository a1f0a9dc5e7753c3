"""Is a record what it says it is? A file may be damaged, or made by others, and still parse.

Both checks raise ValueError that says what is wrong. Behind them the report counts on shapes and types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keel.report.plain import number
from keel.runs import StepRecord
from keel.types import Trajectory

_INTEGERS = ("input_ids", "labels", "policy_version", "turn")
_NUMBERS = ("rollout_logprobs", "old_logprobs", "logprobs", "entropy", "advantages", "importance_weights")


def check_record(record: StepRecord, what: str) -> None:
    """Row streams are [T] of the right kind, sequences cut the rows in order, and each has a trajectory."""
    streams = record.streams
    missing = [name for name in (*_INTEGERS, "loss_mask", "cu_seqlens", "rewards") if name not in streams]
    _demand(not missing, what, f"without {', '.join(missing)}")
    rows = len(streams["labels"]) if streams["labels"].ndim else 0
    for name in (*_INTEGERS, "loss_mask", *_NUMBERS):
        if name in streams:
            kinds = "iu" if name in _INTEGERS else ("biu" if name == "loss_mask" else "f")
            fits = streams[name].shape == (rows,) and streams[name].dtype.kind in kinds
            _demand(fits, what, f"{name} is {streams[name].dtype} {streams[name].shape}, there are {rows} rows")
    starts, owners = streams["cu_seqlens"], streams.get("sequence_to_trajectory")
    _demand(starts.ndim == 1 and len(starts) > 0 and starts.dtype.kind in "iu", what, "cu_seqlens is no list of rows")
    grows = int(starts[0]) == 0 and int(starts[-1]) == rows and bool((np.diff(starts.astype(np.int64)) >= 0).all())
    _demand(grows, what, "cu_seqlens does not cut the rows in order")
    _demand(owners is not None and owners.shape == (len(starts) - 1,), what, "sequences without a trajectory")
    num_trajectories = len(streams["rewards"]) if streams["rewards"].ndim == 1 else 0
    known = owners is not None and bool(((owners >= 0) & (owners < num_trajectories)).all())
    _demand(known, what, "a sequence of a trajectory that is not there")
    segments = streams.get("sequence_to_segment")
    _demand(segments is None or segments.shape == (len(starts) - 1,), what, "sequences without a segment")


def check_trajectories(trajectories: Sequence[Trajectory], what: str) -> None:
    """Fields have the types of `keel.types`, as far as the report reads them, and rewards are finite."""
    for place, each in enumerate(trajectories):
        said = [*each.prompt, *(message for turn in each.turns for message in (*turn.reply, *turn.observation))]
        fields: list[tuple[Any, type]] = [
            (each.attempt, int),
            (each.group_id, str),
            (each.reward_parts, Mapping),
            (each.metrics, Mapping),
            (each.task.data, Mapping),
            *((turn.reply_text, str) for turn in each.turns),
            *((text, str) for message in said for text in (message.role, message.content)),
        ]
        whole = all(isinstance(value, kind) for value, kind in fields) and number(each.reward) is not None
        _demand(whole, what, f"line {place + 1} has a field of another type")


def _demand(holds: bool, what: str, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"{what}: {otherwise}")
