"""Evaluation on held-out tasks: one attempt at each, with the same draws every time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keel.monitor.wilson import success_metrics
from keel.rollouts.metrics import outcome_metrics
from keel.types import UserFault

if TYPE_CHECKING:
    from keel.build import EnvSource
    from keel.config import EvalConfig, TrainConfig
    from keel.rollouts.collector import Collector


class EvaluationError(UserFault, ValueError):
    """The evaluation asked for cannot be had; says what, got and how to fix."""


def evaluate(collector: Collector, config: EvalConfig) -> dict[str, float]:
    """Metrics over the first `config.num_tasks` held-out tasks.

    `success` with its 95 % Wilson interval (`success_low`, `success_high`) if the environment says what a success is,
    `reward`, `num_tasks` (those that the world did not spoil), `failed`, `tokens` and `turns` per episode. Raises
    EvaluationError if that is none, or more than the environment holds out; RolloutError if every attempt failed.
    """
    if config.num_tasks == 0:
        raise EvaluationError("eval.num_tasks is 0, so there is nothing to evaluate: set it to a number of tasks")
    held_out = collector.tasks("eval")
    if len(held_out) < config.num_tasks:
        raise EvaluationError(
            f"eval.num_tasks is {config.num_tasks}, but the environment holds out {len(held_out)} tasks: "
            "lower it, or let the environment make more"
        )
    tasks = [held_out[index] for index in range(config.num_tasks)]
    trajectories = collector.collect_eval(tasks, temperature=config.temperature, seed=config.seed)
    kept = [trajectory for trajectory in trajectories if not trajectory.failed]
    outcome = outcome_metrics(trajectories)
    metrics = {
        "num_tasks": float(len(kept)),
        "failed": outcome["rollout/failed"],
        "reward": outcome["reward/mean"],
        "tokens": sum(trajectory.num_policy_tokens for trajectory in kept) / len(kept),
        "turns": outcome["rollout/turns"],
        "malformed": outcome["rollout/malformed"],
    }
    if "success" in outcome:
        metrics |= success_metrics(round(outcome["success"] * len(kept)), len(kept))
    return metrics


def evaluate_checkpoint(config: TrainConfig, env: EnvSource | None = None) -> dict[str, float]:
    """Evaluate the model of `config.model` on the config's environment, without a learner and a run directory.

    `model.path` is any Hugging Face directory or hub id; of a run's checkpoint it is the directory `weights`. Raises
    what `evaluate` raises.
    """
    from keel.build import build_sampler

    with build_sampler(config, env) as collector:
        return evaluate(collector, config.eval)
