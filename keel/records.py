"""What a step leaves for later reading: every token stream, and the trajectories in words (docs/loop.md)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from keel.batch import MicroBatch, PackedBatch
from keel.config import Stage, TrainConfig
from keel.learner.base import Update
from keel.rollouts.store import write_step_record, write_trajectories
from keel.types import Group

if TYPE_CHECKING:
    from keel.monitor.runlog import RunLog


def write_records(
    run: RunLog,
    config: TrainConfig,
    stage: Stage,
    step: int,
    groups: Sequence[Group],
    batch: PackedBatch,
    updates: Sequence[Update],
) -> None:
    """Write `steps/<step>.safetensors` and `trajectories/<step>.jsonl`, if the stage records and one is due."""
    if stage.record_every == 0 or step % stage.record_every:
        return
    name = f"{step:06d}"
    write_step_record(
        run.paths.steps / f"{name}.safetensors", step_streams(batch, updates), _header(config, stage, step)
    )
    write_trajectories(run.paths.trajectories / f"{name}.jsonl", (t for group in groups for t in group.trajectories))
    if config.record.keep:
        for directory in (run.paths.steps, run.paths.trajectories):
            for old in sorted(directory.iterdir())[: -config.record.keep]:
                old.unlink()


def step_streams(batch: PackedBatch, updates: Sequence[Update]) -> dict[str, np.ndarray]:
    """The batch's streams end to end, `[T]` over all micro-batches, as they were trained.

    `cu_seqlens` and `micro_batch_bounds` count rows of the whole batch, `update_bounds` micro-batches, and
    `support_offsets [T + 1]` what is in `support_ids`. `logprobs` and
    `entropy` are the learner's, with the weights before each update; in one-update mode they are `old_logprobs` too.
    """
    streams: dict[str, list[torch.Tensor]] = {}
    starts = [0]
    cu_seqlens = [torch.zeros(1, dtype=torch.int64)]
    support_offsets = [torch.zeros(1, dtype=torch.int64)]
    for micro_batch in batch.micro_batches:
        for name, stream in _streams(micro_batch).items():
            streams.setdefault(name, []).append(stream)
        cu_seqlens.append(micro_batch.cu_seqlens[1:].long() + starts[-1])
        if micro_batch.support_offsets is not None:
            support_offsets.append(micro_batch.support_offsets[1:].cpu() + support_offsets[-1][-1])
        starts.append(starts[-1] + micro_batch.num_tokens)
    computed = {index: found for update in updates for index, found in update.streams.items()}
    for index in sorted(computed):
        for name, stream in computed[index].items():
            streams.setdefault(name, []).append(stream)
    return {
        **{name: torch.cat(parts).cpu().numpy() for name, parts in streams.items()},
        **({"support_offsets": torch.cat(support_offsets).numpy()} if len(support_offsets) > 1 else {}),
        "cu_seqlens": torch.cat(cu_seqlens).numpy(),
        "micro_batch_bounds": np.asarray(starts, dtype=np.int64),
        "update_bounds": np.asarray(batch.update_bounds, dtype=np.int64),
        "rewards": batch.rewards.numpy(),
        "trajectory_to_group": batch.trajectory_to_group.numpy(),
    }


def largest_sizes(batch: PackedBatch) -> dict[str, int]:
    """What decides how much memory a batch takes, for messages: its largest micro-batch and longest sequence."""
    if not batch.micro_batches:
        return {}
    largest = max(batch.micro_batches, key=lambda micro_batch: micro_batch.num_tokens)
    lengths = [int(length) for micro_batch in batch.micro_batches for length in micro_batch.cu_seqlens.diff()]
    return {
        "tokens_in_the_largest_micro-batch": largest.num_tokens,
        "sequences_in_it": len(largest.cu_seqlens) - 1,
        "tokens_in_the_longest_sequence": max(lengths),
    }


def _streams(micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
    """The streams that run over rows or sequences; absent ones are left out."""
    found = {field.name: getattr(micro_batch, field.name) for field in dataclasses.fields(micro_batch)}
    return {
        name: value.contiguous()
        for name, value in found.items()
        if isinstance(value, torch.Tensor) and name not in ("cu_seqlens", "support_offsets")
    }


def _header(config: TrainConfig, stage: Stage, step: int) -> dict[str, Any]:
    rollout = config.rollout
    cuda_state = {}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        cuda_state["cuda_random_state"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return {
        "step": step,
        "stage": stage.name,
        "seed": config.seed,
        "config_hash": hashlib.blake2b(
            config.model_dump_json(exclude={"run_dir"}).encode(), digest_size=16
        ).hexdigest(),
        "sampling": {"temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k},
        # Draws are made of (seed, step, group, attempt, turn); the learner's own generator is the one state there is.
        "torch_random_state": torch.get_rng_state().numpy().tobytes().hex(),
        **cuda_state,
    }
