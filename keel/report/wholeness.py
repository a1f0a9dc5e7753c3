"""Is a record what the report counts on? `keel.runs` checks shapes and types as far as anybody needs them; these are
the checks of what the token view reads besides. Both raise ValueError that says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

from keel.report.plain import number
from keel.runs import StepRecord
from keel.types import Trajectory

_INTEGERS = ("input_ids", "labels", "policy_version", "turn")
_FLOATS = ("rollout_logprobs", "old_logprobs", "logprobs", "entropy", "advantages", "importance_weights")


def check_record(record: StepRecord, what: str) -> None:
    """The streams of the token view are there, flat and of their kind, and each sequence has a trajectory."""
    streams = record.streams
    missing = [name for name in (*_INTEGERS, "loss_mask", "rewards") if name not in streams]
    _demand(not missing, what, f"it has no {', '.join(missing)}")
    kinds = dict.fromkeys(_INTEGERS, "iu") | dict.fromkeys(_FLOATS, "f") | {"loss_mask": "biu", "rewards": "f"}
    for name, kind in kinds.items():
        stream = streams.get(name)
        if stream is not None:
            _demand(stream.ndim == 1 and stream.dtype.kind in kind, what, f"{name} is {stream.dtype} {stream.shape}")
    owners = streams["sequence_to_trajectory"]
    known = bool(((owners >= 0) & (owners < len(streams["rewards"]))).all())
    _demand(known, what, "a sequence of a trajectory that is not there")


def check_trajectories(trajectories: Sequence[Trajectory], what: str) -> None:
    """Rewards are finite numbers."""
    for line, each in enumerate(trajectories, start=1):
        _demand(number(each.reward) is not None, what, f"the reward in line {line} is no finite number")


def _demand(holds: bool, what: str, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"{what}: {otherwise}")
