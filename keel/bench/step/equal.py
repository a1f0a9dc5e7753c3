"""Do the two trainers make the same gradient of the same episodes? Asked before anything is timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from keel.bench.measure import BenchError
from keel.bench.step.keel_side import config_of, opened, tokens_after_prompt
from keel.bench.step.side import Gate
from keel.bench.step.trl_side import make_trainer, options_of
from keel.bench.step.work import Work
from keel.loop import prepare_batch
from keel.types import Group, Trajectory

TOLERANCE = 1e-4
"""Of the gradient's norm, in float32: the two add the same numbers up in other orders."""


def compare(gate: Gate, *, work: Work, model: str, scratch: str, threads: int) -> None:
    """One step of Keel's, and TRL's gradient of the very same tokens; reports "apart", their distance.

    Raises BenchError if it is above `TOLERANCE`, or an episode is not as long as `work` says.
    """
    torch.set_num_threads(threads)
    groups, ours = _keel_gradients(work, Path(model), Path(scratch) / "keel", threads)
    theirs = _trl_gradients(work, Path(model), Path(scratch) / "trl", groups)
    apart = distance(ours, theirs)
    if not apart <= TOLERANCE:
        raise BenchError(f"{work.name}: the gradients are {apart:.2g} apart, above {TOLERANCE:.2g}: nothing to compare")
    tokens = sum(trajectory.num_tokens for group in groups for trajectory in group.trajectories)
    gate.wait({"apart": apart, "tokens": tokens})


def distance(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """The norm of the difference of two gradients, by the norm of the second. Raises BenchError for other names."""
    if ours.keys() != theirs.keys():
        raise BenchError(f"the two train other parameters: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    off = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours)
    size = sum(float(gradient.double().square().sum()) for gradient in theirs.values())
    return float((off / size) ** 0.5) if size > 0 else float("inf")


def _keel_gradients(
    work: Work, model: Path, run_dir: Path, threads: int
) -> tuple[Sequence[Group], dict[str, torch.Tensor]]:
    config = config_of(work, model, run_dir, threads=threads, check=True)
    with opened(config, work) as (run, parts):
        (stage,) = config.stages()
        watch = parts.watch(run.progress, stage, 0)
        learner: Any = parts.learner
        learner.enter(stage)
        groups = parts.sources[stage.name].next_groups(0)
        _require_lengths(work, groups)
        learner.backward(prepare_batch(config, learner, stage, groups, watch))
        return groups, {name: gradient.clone() for name, gradient in learner.optimizer.gradients.items()}


def _require_lengths(work: Work, groups: Sequence[Group]) -> None:
    for trajectory in (trajectory for group in groups for trajectory in group.trajectories):
        drawn = [len(span) for segment in trajectory.segments for span in segment if span.origin == "policy"]
        if drawn != [work.reply_tokens] * work.turns:
            raise BenchError(f"{work.name}: an episode has replies of {drawn} tokens: {trajectory.error or ''}")


def _trl_gradients(work: Work, model: Path, output: Path, groups: Sequence[Group]) -> dict[str, torch.Tensor]:
    """TRL's gradient, unclipped, of Keel's episodes in place of its own."""
    found: dict[str, torch.Tensor] = {}

    class Catch(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **also: Any) -> None:  # noqa: ARG002
            for name, parameter in also["model"].named_parameters():
                found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()

    options = options_of(work, output, rows=8)
    options.max_steps, options.max_grad_norm = 1, 0.0
    also = {"callbacks": [Catch()], "rollout_func": _replayed(groups), "tools": None}
    make_trainer(work, model, options, experts="eager", **also).train()
    return found


def _replayed(groups: Sequence[Group]) -> Any:
    """A rollout function that gives Keel's episodes, attempt by attempt, to whoever asks for a prompt."""

    def rollout(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:  # noqa: ARG001
        left = {group.task.data["prompt"]: iter(group.trajectories) for group in groups}
        chosen = [next(left[prompt[-1]["content"]]) for prompt in prompts]
        return {
            "prompt_ids": [list(trajectory.segments[0].spans[0].token_ids) for trajectory in chosen],
            "completion_ids": [tokens_after_prompt(trajectory) for trajectory in chosen],
            "logprobs": [[0.0] * len(tokens_after_prompt(trajectory)) for trajectory in chosen],
            "env_mask": [_drawn(trajectory) for trajectory in chosen],
        }

    return rollout


def _drawn(trajectory: Trajectory) -> list[int]:
    """1 for a token of the policy's, 0 for one of the tool's, of everything after the prompt."""
    (segment,) = trajectory.segments
    return [int(span.origin == "policy") for span in segment.spans[1:] for _ in span.token_ids]
