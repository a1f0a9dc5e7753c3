"""Trajectory -> PackedBatch: the only place that shifts tokens.

A sequence of n tokens becomes n - 1 rows: row t feeds `input_ids[t]` and predicts `labels[t]`, the token after it. The
last token of a sequence is only ever a label. Sequences are laid end to end in micro-batches, without padding.

Worked example, one sequence of five tokens, of which the policy drew the last two:

    tokens      10 11 12 13 14         rows   0   1   2   3
    origin       c  c  c  p  p         input_ids  10  11  12  13
                                       labels     11  12  13  14
                                       loss_mask   0   0   1   1
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain, pairwise
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from keel.batch_support import SupportRows
from keel.types import MISSING_ROUTE, Group, Segment, TokenSpan, Trajectory

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class MicroBatch:
    """`T` rows of `S` whole sequences, on one device. Optional streams are absent (None), never zero.

    A row's streams speak of its input or of its label, as noted.
    """

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, restarts at 0 with each sequence
    labels: torch.Tensor  # [T] int64, the next token
    loss_mask: torch.Tensor  # [T] bool, about the label: it was drawn by the policy (or demonstrated)
    cu_seqlens: torch.Tensor  # [S + 1] int32, row where each sequence starts, and T
    sequence_to_trajectory: torch.Tensor  # [S] int64, index into the batch's trajectories
    policy_version: torch.Tensor  # [T] int32, about the label; -1 where not drawn
    temperature: torch.Tensor  # [T] float32, about the label; 1.0 where not drawn
    turn: torch.Tensor  # [T] int32, about the label: which reply of the trajectory; -1 where context
    max_seqlen: int
    sequence_to_segment: torch.Tensor | None = None  # [S] int64, index into the trajectory's segments
    rollout_logprobs: torch.Tensor | None = None  # [T] float32, about the label; 0.0 where not drawn
    routed_experts: torch.Tensor | None = None  # [T, layers, k] int32, about the input; -1 where unknown
    advantages: torch.Tensor | None = None  # [T] float32, about the label
    old_logprobs: torch.Tensor | None = None  # [T] float32, about the label
    ref_logprobs: torch.Tensor | None = None  # [T] float32, about the label
    values: torch.Tensor | None = None  # [T] float32, about the label
    importance_weights: torch.Tensor | None = None  # [T] float32, about the label
    loss_weights: torch.Tensor | None = None  # [T] float64, what the reduction weighs the label with; None: all 1
    replayed_routes: torch.Tensor | None = None  # [T, layers, k] int32, about the input: what the score pass chose
    top_k: torch.Tensor | None = None  # [T] int32, about the label; 0 where nothing was cut to the k most likely
    top_p: torch.Tensor | None = None  # [T] float64, about the label; 1.0 where nothing was cut to a share
    support_ids: torch.Tensor | None = None  # [M] int32, what labels were chosen from, row after row
    support_offsets: torch.Tensor | None = None  # [T + 1] int64, where each row's ids start, and M; none: nothing cut
    support_missing: torch.Tensor | None = None  # [T] bool, the label's distribution was cut, nobody said to what

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_sequences(self) -> int:
        return int(self.cu_seqlens.shape[0]) - 1

    @property
    def row_to_sequence(self) -> torch.Tensor:
        """[T] int64, the sequence each row belongs to."""
        lengths = self.cu_seqlens.diff().long()
        sequences = torch.arange(self.num_sequences, device=self.cu_seqlens.device)
        return torch.repeat_interleave(sequences, lengths, output_size=self.num_tokens)

    @property
    def row_to_trajectory(self) -> torch.Tensor:
        """[T] int64, index of each row's trajectory in the batch."""
        return self.sequence_to_trajectory[self.row_to_sequence]

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch with every stream on `device`; itself if it is there already."""
        if self.input_ids.device == torch.device(device):
            return self
        streams = {item.name: getattr(self, item.name) for item in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in streams.items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class PackedBatch:
    """All of a step's sequences, as an ordered list of micro-batches that scoring and training both iterate.

    `update_bounds` cuts the list into optimizer steps: update i trains micro-batches `update_bounds[i]` to
    `update_bounds[i + 1] - 1`. The per-trajectory fields are indexed by `sequence_to_trajectory`.
    `denominators[i]` is the number of loss tokens of update i over all its micro-batches and all ranks; 0 means that
    there is nothing to learn from, which is an outcome and not an error. `metrics` is what packing, correction and
    advantages have to say about the batch.
    """

    micro_batches: tuple[MicroBatch, ...]
    update_bounds: tuple[int, ...]
    denominators: tuple[float, ...]
    rewards: torch.Tensor  # [N] float32
    trajectory_to_group: torch.Tensor  # [N] int64
    num_groups: int
    trajectory_ids: tuple[str, ...]  # [N] "<group id>/<attempt>"
    metrics: Mapping[str, float] = field(default_factory=dict)
    rejected: torch.Tensor | None = None  # [N] bool, trajectories that a correction left out whole
    loss_denominators: tuple[float, ...] | None = None  # what each update's loss is divided by; None: `denominators`

    @property
    def num_updates(self) -> int:
        return len(self.update_bounds) - 1

    @property
    def num_loss_tokens(self) -> int:
        return int(sum(self.denominators))

    @property
    def is_empty(self) -> bool:
        """No token to learn from: every trajectory failed, or none has a reply."""
        return self.num_loss_tokens == 0

    def update(self, index: int) -> tuple[MicroBatch, ...]:
        """The micro-batches of optimizer step `index`. Raises IndexError if there is none such."""
        if not 0 <= index < self.num_updates:
            raise IndexError(f"update {index} of a batch with {self.num_updates} updates")
        return self.micro_batches[self.update_bounds[index] : self.update_bounds[index + 1]]

    def with_micro_batches(
        self, micro_batches: Iterable[MicroBatch], metrics: Mapping[str, float] = MappingProxyType({})
    ) -> PackedBatch:
        """The same batch with other streams; the denominators are counted anew, since a mask may have changed."""
        replaced = tuple(micro_batches)
        if len(replaced) != len(self.micro_batches):
            raise ValueError(
                f"got {len(replaced)} micro-batches, the batch has {len(self.micro_batches)}: keep the split"
            )
        return replace(
            self,
            micro_batches=replaced,
            denominators=_denominators(replaced, self.update_bounds),
            metrics={**self.metrics, **metrics},
        )


def pack(groups: Sequence[Group], *, max_tokens: int, num_updates: int = 1) -> PackedBatch:
    """Lay the sequences of all kept trajectories end to end in micro-batches of at most `max_tokens` rows.

    Order is the order given: groups, attempts, segments. A sequence is never cut; one longer than `max_tokens` is a
    micro-batch of its own. Failed trajectories do not enter. Groups are dealt evenly, in order and whole, to
    `num_updates` optimizer steps of at least one micro-batch each; with fewer groups than that, there are as many
    updates as groups. A batch without any sequence has one update, no micro-batch and denominator 0.

    Raises ValueError for a non-finite reward, tokens drawn greedily (they are no sample of a distribution), routes of
    unequal shapes, and a drawn token outside what the engine says it was chosen from.
    """
    if max_tokens < 1 or num_updates < 1:
        raise ValueError(f"pack: got max_tokens={max_tokens}, num_updates={num_updates}; both must be at least 1")
    kept = [(index, trajectory) for index, group in enumerate(groups) for trajectory in group.kept]
    for _, trajectory in kept:
        _check(trajectory)
    # One token is only ever a label of nothing: such a sequence has no row.
    sequences = [
        _Sequence(index, group, order, trajectory, segment)
        for index, (group, trajectory) in enumerate(kept)
        for order, segment in enumerate(trajectory.segments)
        if len(segment) > 1
    ]
    lengths = [len(sequence.segment) - 1 for sequence in sequences]
    bounds, update_bounds = _split([sequence.group for sequence in sequences], lengths, max_tokens, num_updates)
    micro_batches = tuple(_micro_batches(sequences, lengths, bounds)) if sequences else ()
    return PackedBatch(
        micro_batches=micro_batches,
        update_bounds=update_bounds,
        denominators=_denominators(micro_batches, update_bounds),
        rewards=torch.tensor([trajectory.reward for _, trajectory in kept], dtype=torch.float32),
        trajectory_to_group=torch.tensor([group for group, _ in kept], dtype=torch.int64),
        num_groups=len(groups),
        trajectory_ids=tuple(f"{trajectory.group_id}/{trajectory.attempt}" for _, trajectory in kept),
    )


@dataclass(frozen=True, slots=True)
class _Sequence:
    trajectory_index: int
    group: int
    segment_index: int
    trajectory: Trajectory
    segment: Segment


def _check(trajectory: Trajectory) -> None:
    name = f"{trajectory.group_id}/{trajectory.attempt}"
    if not math.isfinite(trajectory.reward):
        raise ValueError(
            f"trajectory {name}: reward is {trajectory.reward}; a reward must be finite, and an episode that the world "
            "spoiled has a failed status instead"
        )
    for segment in trajectory.segments:
        for span in segment.spans:
            if span.sampling is not None and span.sampling.temperature <= 0:
                raise ValueError(
                    f"trajectory {name}: tokens drawn greedily (temperature {span.sampling.temperature}) cannot be "
                    "trained on, they are no sample of a distribution; sample with temperature > 0"
                )


def _split(
    groups: list[int], lengths: list[int], max_tokens: int, num_updates: int
) -> tuple[list[int], tuple[int, ...]]:
    """Cut sequences into micro-batches and these into updates.

    Returns `bounds [M + 1]` (first sequence of each micro-batch, and the number of sequences) and `update_bounds`.
    """
    present = sorted(set(groups))
    num_updates = max(1, min(num_updates, len(present)))
    update_of = {group: order * num_updates // len(present) for order, group in enumerate(present)}
    bounds: list[int] = []
    update_bounds: list[int] = []
    room, update = 0, -1
    for index, (group, length) in enumerate(zip(groups, lengths, strict=True)):
        if update_of[group] != update:
            update_bounds.append(len(bounds))
        elif length <= room:
            room -= length
            continue
        bounds.append(index)
        room, update = max_tokens - length, update_of[group]
    return [*bounds, len(groups)], (*(update_bounds or [0]), len(bounds))


def _micro_batches(sequences: list[_Sequence], lengths: list[int], bounds: list[int]) -> Iterator[MicroBatch]:
    """Build every stream once for the whole batch, then cut: per-token work is done by numpy alone."""
    tokens, about_label, routes = _token_streams(sequences)
    support = SupportRows.of([span for each in sequences for span in each.segment.spans], tokens)
    row_ends = np.cumsum(lengths)  # [S]
    num_rows = int(row_ends[-1])
    starts = row_ends - lengths  # [S] first row of each sequence
    # A sequence has one token more than rows: sequence s is shifted by s.
    inputs = np.arange(num_rows) + np.repeat(np.arange(len(sequences)), lengths)  # [rows] index into tokens
    rows: dict[str, Array] = {
        "input_ids": tokens[inputs],
        "positions": np.arange(num_rows) - np.repeat(starts, lengths),
        "labels": tokens[inputs + 1],
        **{name: stream[inputs + 1] for name, stream in about_label.items()},
    }
    if routes is not None:
        rows["routed_experts"] = routes[inputs]
    if support is not None:
        rows |= {name: stream[inputs + 1] for name, stream in support.settings.items()}
    row_starts = np.concatenate([starts, [num_rows]])
    to_trajectory = np.array([sequence.trajectory_index for sequence in sequences], dtype=np.int64)
    to_segment = np.array([sequence.segment_index for sequence in sequences], dtype=np.int64)
    for first, last in pairwise(bounds):
        start, stop = int(row_starts[first]), int(row_starts[last])
        yield MicroBatch(
            cu_seqlens=torch.from_numpy((row_starts[first : last + 1] - start).astype(np.int32)),
            sequence_to_trajectory=torch.from_numpy(to_trajectory[first:last].copy()),
            sequence_to_segment=torch.from_numpy(to_segment[first:last].copy()),
            max_seqlen=max(lengths[first:last]),
            # Copied, so that a micro-batch owns (and, sent elsewhere, carries) its own rows only.
            **{name: torch.from_numpy(stream[start:stop].copy()) for name, stream in rows.items()},
            **({} if support is None else support.streams(inputs[start:stop] + 1)),
        )


def _token_streams(sequences: list[_Sequence]) -> tuple[Array, dict[str, Array], Array | None]:
    """Of all tokens of all sequences: ids, streams about the token as a label, and routes (None: there are none)."""
    spans = [span for sequence in sequences for span in sequence.segment.spans]
    sizes = np.array([len(span) for span in spans], dtype=np.int64)
    num_tokens = int(sizes.sum())
    tokens = np.fromiter(chain.from_iterable(span.token_ids for span in spans), dtype=np.int64, count=num_tokens)

    def spread(values: Iterable[Any], dtype: npt.DTypeLike) -> Array:
        return np.repeat(np.fromiter(values, dtype=dtype, count=len(spans)), sizes)

    drawn = spread((span.logprobs is not None for span in spans), np.bool_)
    about_label: dict[str, Array] = {
        # Who wrote a token decides, never the role it was written in.
        "loss_mask": spread((span.origin != "context" for span in spans), np.bool_),
        "policy_version": spread((-1 if v is None else v for v in (span.policy_version for span in spans)), np.int32),
        "temperature": spread((1.0 if s is None else s.temperature for s in (s.sampling for s in spans)), np.float32),
        "turn": spread(chain.from_iterable(map(_turns, sequences)), np.int32),
    }
    if drawn.any():
        logprobs = np.zeros(num_tokens, dtype=np.float32)
        logprobs[drawn] = np.fromiter(chain.from_iterable(span.logprobs or () for span in spans), dtype=np.float32)
        about_label["rollout_logprobs"] = logprobs
    return tokens, about_label, _routes(spans)


def _turns(sequence: _Sequence) -> Iterator[int]:
    """For each span of a segment, the turn it belongs to. A reply drawn under two versions has two spans."""
    starts = {
        turn.span: index
        for index, turn in enumerate(sequence.trajectory.turns)
        if turn.segment == sequence.segment_index
    }
    current = -1
    for index, span in enumerate(sequence.segment.spans):
        current = -1 if span.origin == "context" else starts.get(index, current)
        yield current


def _routes(spans: list[TokenSpan]) -> Array | None:
    """[num_tokens, layers, k] int32 with -1 where unknown, or None if no span has routes."""
    shapes = {(r.num_layers, r.top_k) for r in (span.routed_experts for span in spans) if r is not None}
    if not shapes:
        return None
    if len(shapes) > 1:
        raise ValueError(f"pack: routes of (layers, top_k) {sorted(shapes)} in one batch; one model gives one shape")
    num_layers, top_k = shapes.pop()
    unknown = np.full(num_layers * top_k, MISSING_ROUTE, dtype=np.uint16).tobytes()
    data = b"".join(span.routed_experts.data if span.routed_experts else unknown * len(span) for span in spans)
    routes = np.frombuffer(data, dtype=np.uint16).astype(np.int32).reshape(-1, num_layers, top_k)
    routes[routes == MISSING_ROUTE] = -1
    return routes


def _denominators(micro_batches: tuple[MicroBatch, ...], update_bounds: tuple[int, ...]) -> tuple[float, ...]:
    counts = [int(micro_batch.loss_mask.sum()) for micro_batch in micro_batches]
    return tuple(float(sum(counts[first:last])) for first, last in pairwise(update_bounds))
