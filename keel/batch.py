"""Trajectory -> PackedBatch: the only place that shifts tokens.

A sequence of n tokens becomes n - 1 rows: row t feeds `input_ids[t]` and predicts `labels[t]`, the token after it. The
last token of a sequence is only ever a label. Sequences are laid end to end in micro-batches, without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
    rollout_logprobs: torch.Tensor | None = None  # [T] float32, about the label; 0.0 where not drawn
    routed_experts: torch.Tensor | None = None  # [T, layers, k] int32, about the input; -1 where unknown
    advantages: torch.Tensor | None = None  # [T] float32, about the label
    old_logprobs: torch.Tensor | None = None  # [T] float32, about the label
    ref_logprobs: torch.Tensor | None = None  # [T] float32, about the label
    values: torch.Tensor | None = None  # [T] float32, about the label
    importance_weights: torch.Tensor | None = None  # [T] float32, about the label

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def num_sequences(self) -> int:
        return int(self.cu_seqlens.shape[0]) - 1


@dataclass(frozen=True)
class PackedBatch:
    """All of a step's sequences, as an ordered list of micro-batches that scoring and training both iterate.

    `update_bounds` cuts the list into optimizer steps: update i trains micro-batches `update_bounds[i]` to
    `update_bounds[i + 1] - 1`. The per-trajectory fields are indexed by `sequence_to_trajectory`.
    `denominators[i]` is the number of loss tokens of update i over all its micro-batches and all ranks.
    """

    micro_batches: tuple[MicroBatch, ...]
    update_bounds: tuple[int, ...]
    denominators: tuple[float, ...]
    rewards: torch.Tensor  # [N] float32
    trajectory_to_group: torch.Tensor  # [N] int64
    num_groups: int
    trajectory_ids: tuple[str, ...]  # [N] "<group id>/<attempt>"
