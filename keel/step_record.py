"""A step record, read: every token stream of one training step (docs/loop.md, "Step records").

Nothing is imported or unpickled: the format is safetensors, and the shapes that its readers rely on are checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keel.monitor import cells
from keel.monitor.rows import RunDirectoryError
from keel.rollouts.store import RecordError, read_step_record

Array = npt.NDArray[Any]

# What runs over sequences, micro-batches, updates, trajectories or supports instead of rows.
_NOT_ROWS = {
    "cu_seqlens",
    "micro_batch_bounds",
    "update_bounds",
    "rewards",
    "trajectory_to_group",
    "sequence_to_trajectory",
    "sequence_to_segment",
    "support_ids",
    "support_offsets",
}
_OF_INPUTS = {"input_ids", "positions", "routed_experts", "replayed_routes"}


@dataclass(frozen=True)
class SequenceView:
    """One sequence of a step record: n tokens, n - 1 rows. `streams` are views of the record's row streams."""

    index: int
    trajectory: int  # among the step's attempts that the world did not spoil, in file order
    segment: int  # of the trajectory
    streams: Mapping[str, Array]  # name -> [n - 1] or [n - 1, ...]

    @property
    def token_ids(self) -> Array:
        """[n] int64: every token that the engine read or drew, the first one included."""
        return np.concatenate([self.streams["input_ids"][:1], self.streams["labels"]])

    def per_token(self, name: str) -> list[Any]:
        """[n] values of a stream at the token they speak of; None where there is none.

        Most streams speak of labels and so have nothing to say of the first token; those of inputs
        (`positions`, `routed_experts`) have nothing to say of the last. Raises KeyError for an unknown stream.
        """
        values = self.streams[name].tolist()
        return [*values, None] if name in _OF_INPUTS else [None, *values]


@dataclass(frozen=True)
class StepRecord:
    """Every token stream of one step (docs/loop.md, "Step records"), read from `path`."""

    path: Path
    streams: Mapping[str, Array] = field(repr=False)  # name -> array; row streams are [T] or [T, ...]
    header: Mapping[str, Any] = field(repr=False)  # step, stage, seed, sampling, config_hash, ...

    @property
    def step(self) -> int:
        return int(self.header["step"])

    @property
    def num_tokens(self) -> int:
        """Rows T of the step; 0 if every attempt failed."""
        return len(self.streams["input_ids"]) if "input_ids" in self.streams else 0

    @cached_property
    def sequences(self) -> tuple[SequenceView, ...]:
        """The step's sequences in order of packing: groups, attempts, segments."""
        if self.num_tokens == 0:
            return ()
        starts = self.streams["cu_seqlens"].tolist()
        trajectories = self.streams["sequence_to_trajectory"].tolist()
        segments = self.streams.get("sequence_to_segment")
        rows = {name: stream for name, stream in self.streams.items() if name not in _NOT_ROWS}
        seen: dict[int, int] = {}
        views = []
        for index, (start, stop, trajectory) in enumerate(zip(starts[:-1], starts[1:], trajectories, strict=True)):
            order = seen.get(trajectory, 0)
            seen[trajectory] = order + 1
            segment = order if segments is None else int(segments[index])
            views.append(SequenceView(index, trajectory, segment, {name: rows[name][start:stop] for name in rows}))
        return tuple(views)

    def _repr_html_(self) -> str:
        rows = [(name, stream.dtype, list(stream.shape)) for name, stream in self.streams.items()]
        title = f"step {self.header.get('step')}: {self.num_tokens:,} rows, {len(self.sequences):,} sequences"
        return cells.table(title, ("stream", "type", "shape"), rows)

    def support(self, row: int) -> Array:
        """What the label of `row` was chosen from, `[n]` token ids; none where nothing was cut."""
        if "support_offsets" not in self.streams:
            return np.empty(0, dtype=np.int32)
        start, stop = self.streams["support_offsets"][row : row + 2]
        return self.streams["support_ids"][start:stop]

    def of_trajectory(self, trajectory: int) -> tuple[SequenceView, ...]:
        """The sequences of one trajectory, numbered as in `sequence_to_trajectory`."""
        return tuple(view for view in self.sequences if view.trajectory == trajectory)


def load_record(path: str | Path) -> StepRecord:
    """The step record in a file like RUN/steps/000137.safetensors. Raises RunDirectoryError if it is none."""
    file = Path(path)
    if not file.is_file():
        raise RunDirectoryError(f"{file} is not a file; give a step record, as RUN/steps/000000.safetensors")
    try:
        streams, header = read_step_record(file)
    except (RecordError, OSError, TypeError, RecursionError) as error:  # TypeError: a type that numpy has not
        raise RunDirectoryError(f"{file}: cannot be read as a step record: {error}") from error
    fault = _fault(streams, header)
    if fault:
        raise RunDirectoryError(f"{file}: not a step record: {fault}")
    return StepRecord(file, streams, header)


def _fault(streams: Mapping[str, Array], header: Mapping[str, Any]) -> str:
    """What is wrong with a step record, so that whoever reads its streams may rely on their shapes."""
    if not isinstance(header.get("step"), int):
        return "its header has no step number"
    if "input_ids" not in streams:
        return ""
    num_rows = len(streams["input_ids"])
    missing = {"labels", "cu_seqlens", "sequence_to_trajectory"} - streams.keys()
    if missing:
        return f"it has no {', '.join(sorted(missing))}"
    odd = [name for name in streams.keys() - _NOT_ROWS if streams[name].ndim == 0 or len(streams[name]) != num_rows]
    starts = streams["cu_seqlens"]
    if odd:
        return f"{', '.join(sorted(odd))} and input_ids differ in length"
    offsets, ids = streams.get("support_offsets"), streams.get("support_ids")
    if (offsets is None) != (ids is None) or (
        offsets is not None and ids is not None and not _bounds_rows(offsets, num_rows, len(ids))
    ):
        return "support_offsets does not bound what its labels were chosen from"
    if starts.ndim != 1 or len(starts) != len(streams["sequence_to_trajectory"]) + 1 or np.any(np.diff(starts) < 0):
        return "cu_seqlens does not bound its sequences"
    return "" if starts[0] == 0 and starts[-1] == num_rows else "cu_seqlens does not cover its rows"


def _bounds_rows(offsets: Array, num_rows: int, size: int) -> bool:
    """Are `offsets` those of `num_rows` rows that lie end to end in `size` values?"""
    return (
        offsets.shape == (num_rows + 1,)
        and offsets[0] == 0
        and offsets[-1] == size
        and not np.any(np.diff(offsets) < 0)
    )
