"""The monitor's consistency part: the gap of a step that was just taken, every N steps, at next to no cost.

No pass of the model is made. The learner's log-probs come back from every rank for the step's record anyway, and the
engine's came with the trajectories, so all of a step's drawn tokens are in this process at once: percentiles over ranks
and micro-batches are those of one array, exact, and nothing has to be merged. Tokens that a correction rejected are
counted too, for a mask that hides the gap does not make it small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from keel.batch import MicroBatch, PackedBatch
from keel.config_monitor import MonitorConfig
from keel.gap.log import LoggedSequence
from keel.gap.statistics import gap_statistics, peer_statistics
from keel.gap.worst import Words, WorstToken, worst_tokens
from keel.learner.base import Update

__all__ = ["Consistency", "StepGap"]

OWN = ("abs_p50", "abs_p90", "abs_p99", "ess", "chi2")
"""Statistics of `keel.gap.statistics` that the learner does not log at every step by itself."""


@dataclass(frozen=True)
class StepGap:
    """What is logged of one step: columns of its row, and its worst tokens. Both empty where nothing was compared."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    worst: tuple[WorstToken, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """The worst tokens as JSON values."""
        return [asdict(each) for each in self.worst]


class Consistency:
    """Looks at every `monitor.consistency_every`-th step of a stage; `words` spells tokens."""

    def __init__(self, config: MonitorConfig, words: Words) -> None:
        self._every = config.consistency_every
        self._count = config.worst_tokens
        self._words = words

    def look(self, step: int, batch: PackedBatch, updates: Sequence[Update]) -> StepGap:
        """The gap of step `step`, whose batch was trained on by `updates`; empty where it is not due.

        `mismatch/abs_p50`, `_p90`, `_p99`, `mismatch/ess` and `mismatch/chi2` are those of `gap_statistics` over all
        drawn tokens, rejected ones too; `mismatch/not_finite` counts those left out because a log-prob is no number;
        `peers/*` are the figures of `peer_statistics`.
        """
        if self._every == 0 or step % self._every:
            return StepGap()
        computed = {index: streams for update in updates for index, streams in update.streams.items()}
        sequences = [
            sequence
            for index, micro_batch in enumerate(batch.micro_batches)
            for sequence in _sequences(micro_batch, computed.get(index, {}), batch.trajectory_ids)
        ]
        if not sequences:
            return StepGap()
        return StepGap(_metrics(sequences), worst_tokens(sequences, self._count, self._words))


def _sequences(
    micro_batch: MicroBatch, computed: Mapping[str, torch.Tensor], names: Sequence[str]
) -> Iterator[LoggedSequence]:
    """The sequences of a micro-batch that have drawn tokens and both sides."""
    learner = computed.get("logprobs") if micro_batch.old_logprobs is None else micro_batch.old_logprobs
    if learner is None or micro_batch.rollout_logprobs is None:
        return
    rollout, learner_rows = (each.detach().cpu().double().numpy() for each in (micro_batch.rollout_logprobs, learner))
    drawn = (micro_batch.policy_version >= 0).cpu().numpy()
    inputs, labels = micro_batch.input_ids.cpu().numpy(), micro_batch.labels.cpu().numpy()
    starts = micro_batch.cu_seqlens.tolist()
    segments = micro_batch.sequence_to_segment
    for index, trajectory in enumerate(micro_batch.sequence_to_trajectory.tolist()):
        rows = slice(starts[index], starts[index + 1])
        if not drawn[rows].any():
            continue
        segment = 0 if segments is None else int(segments[index])
        yield LoggedSequence(
            f"{names[trajectory]}, segment {segment}" if segment else names[trajectory],
            names[trajectory],
            np.concatenate([inputs[rows][:1], labels[rows]]),
            np.concatenate([[False], drawn[rows]]),
            np.concatenate([[0.0], rollout[rows]]),
            np.concatenate([[0.0], learner_rows[rows]]),
        )


def _metrics(sequences: Sequence[LoggedSequence]) -> dict[str, float]:
    drawn = np.concatenate([each.drawn for each in sequences])
    rollout, learner = (
        np.concatenate([getattr(each, name) for each in sequences])[drawn]
        for name in ("rollout_logprobs", "learner_logprobs")
    )
    owner = np.repeat(np.arange(len(sequences)), [int(each.drawn.sum()) for each in sequences])
    places = {name: place for place, name in enumerate(dict.fromkeys(each.trajectory for each in sequences))}
    owner = np.array([places[each.trajectory] for each in sequences])[owner]
    known = np.isfinite(rollout) & np.isfinite(learner)
    counted = {"mismatch/not_finite": float((~known).sum())}
    own = gap_statistics(rollout[known], learner[known])
    peers = peer_statistics(rollout[known], learner[known], owner[known])
    return {
        **counted,
        **{f"mismatch/{name}": own[name] for name in OWN if name in own},
        **{f"peers/{name}": value for name, value in peers.items()},
    }
