"""What an evaluation found: figures with intervals, and what became of every task."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from keel.monitor.estimates import Estimate, mean_estimate, pass_at_k, share_estimate
from keel.monitor.printable import one_line
from keel.rollouts.metrics import outcome_metrics
from keel.types import Trajectory

SCHEMA_VERSION = 1
"""Version of `EvaluationResult.to_json`."""


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """The attempts at one task: a reward, a success and a status each; None where the world spoilt one, or where the
    environment does not say what a success is."""

    task_id: str
    rewards: tuple[float | None, ...]
    successes: tuple[bool | None, ...]
    statuses: tuple[str, ...]

    @property
    def num_kept(self) -> int:
        """Attempts that the world did not spoil."""
        return sum(reward is not None for reward in self.rewards)

    @property
    def num_successes(self) -> int:
        return sum(success is True for success in self.successes)

    @property
    def reward(self) -> float:
        """The mean over the attempts that count."""
        kept = [reward for reward in self.rewards if reward is not None]
        return sum(kept) / len(kept)


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """An evaluation of `model` on `env`. Estimates are means over tasks, so attempts at one task weigh as one.

    `success` and `pass_at_k` are absent if the environment does not say what a success is. `num_episodes` counts all
    attempts; `failed` those that the world spoilt, `truncated` those cut by a limit, `malformed` replies that could not
    be read. `tokens` (drawn) and `turns` are means per episode that counts.
    """

    model: str
    env: str
    attempts: int
    temperature: float
    seed: int
    reward: Estimate
    success: Estimate | None
    pass_at_k: Mapping[int, Estimate]
    num_episodes: int
    failed: int
    truncated: int
    malformed: int
    num_replies: int
    tokens: float
    turns: float
    tasks: tuple[TaskOutcome, ...] = field(repr=False)

    @property
    def num_tasks(self) -> int:
        """Tasks with an attempt that the world did not spoil."""
        return self.reward.num_tasks

    @property
    def metrics(self) -> dict[str, float]:
        """The figures of an evaluation's row (docs/loop.md), without their "eval/"."""
        found: dict[str, float] = {}
        if self.success is not None:
            found |= _with_interval("success", self.success)
        if self.attempts > 1:  # with one attempt pass@1 is the success
            for k, estimate in self.pass_at_k.items():
                found |= _with_interval(f"pass@{k}", estimate)
        return {
            **found,
            **_with_interval("reward", self.reward),
            "num_tasks": float(self.num_tasks),
            "attempts": float(self.attempts),
            "failed": float(self.failed),
            "truncated": float(self.truncated),
            "malformed": float(self.malformed),
            "tokens": self.tokens,
            "turns": self.turns,
        }

    def to_json(self) -> dict[str, Any]:
        """JSON values of everything here; the keys of `pass_at_k` are strings."""
        value = asdict(self)
        value["pass_at_k"] = {str(k): asdict(estimate) for k, estimate in self.pass_at_k.items()}
        return {"schema_version": SCHEMA_VERSION, "num_tasks": self.num_tasks, **value}

    def rows(self) -> list[tuple[str, str]]:
        """Names and figures, for people."""
        rows = [("model", self.model), ("env", self.env)]
        attempts = f", {self.attempts} attempts each" if self.attempts > 1 else ""
        rows.append(("tasks", f"{self.num_tasks}{attempts}, temperature {self.temperature:g}"))
        if self.success is not None:
            rows.append(("success", _percent(self.success)))
        rows += [
            (f"pass@{k}", _percent(found)) for k, found in self.pass_at_k.items() if k > 1
        ]  # pass@1 is the success
        rows.append(("reward", _plain(self.reward)))
        kept = self.num_episodes - self.failed
        rows += [
            ("failed", _share(self.failed, self.num_episodes, "episodes, which do not count")),
            ("truncated", _share(self.truncated, kept, "episodes")),
            ("malformed", _share(self.malformed, self.num_replies, "replies")),
            ("tokens", f"{self.tokens:.1f} drawn per episode, in {self.turns:.2f} replies"),
        ]
        return rows

    def __str__(self) -> str:
        return "\n".join(f"{name:<10}{one_line(value)}" for name, value in self.rows())

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(one_line(value))}</td></tr>"
            for name, value in self.rows()
        )
        return f"<table>{cells}</table>"


def summarize(
    trajectories: Sequence[Trajectory],
    *,
    attempts: int,
    ks: Sequence[int],
    model: str,
    env: str,
    temperature: float,
    seed: int,
) -> EvaluationResult:
    """The result of `attempts` episodes at each task, those at one task one after the other.

    A task of which fewer than k attempts count is left out of pass@k. At least one episode must count.
    """
    tasks = [_outcome(trajectories[i : i + attempts]) for i in range(0, len(trajectories), attempts)]
    counted = [task for task in tasks if task.num_kept > 0]
    kept = [trajectory for trajectory in trajectories if not trajectory.failed]
    outcome = outcome_metrics(trajectories)
    judged = any(trajectory.success is not None for trajectory in kept)
    return EvaluationResult(
        model=model,
        env=env,
        attempts=attempts,
        temperature=temperature,
        seed=seed,
        reward=mean_estimate([task.reward for task in counted]),
        success=share_estimate([task.num_successes / task.num_kept for task in counted], attempts) if judged else None,
        pass_at_k=_pass_at_k(counted, attempts, ks) if judged else {},
        num_episodes=len(trajectories),
        failed=int(outcome["rollout/failed"]),
        truncated=int(outcome["rollout/truncated"]),
        malformed=int(outcome["rollout/malformed"]),
        num_replies=sum(len(trajectory.turns) for trajectory in kept),
        tokens=sum(trajectory.num_policy_tokens for trajectory in kept) / len(kept),
        turns=outcome["rollout/turns"],
        tasks=tuple(tasks),
    )


def _outcome(attempts: Sequence[Trajectory]) -> TaskOutcome:
    return TaskOutcome(
        task_id=attempts[0].task.id,
        rewards=tuple(None if attempt.failed else attempt.reward for attempt in attempts),
        successes=tuple(None if attempt.failed else attempt.success for attempt in attempts),
        statuses=tuple(attempt.status for attempt in attempts),
    )


def _pass_at_k(tasks: Sequence[TaskOutcome], attempts: int, ks: Sequence[int]) -> dict[int, Estimate]:
    found = {}
    for k in ks:
        shares = [pass_at_k(task.num_kept, task.num_successes, k) for task in tasks if task.num_kept >= k]
        if shares:
            found[k] = share_estimate(shares, attempts / k)
    return found


def _with_interval(name: str, estimate: Estimate) -> dict[str, float]:
    if estimate.low is None or estimate.high is None:
        return {name: estimate.value}
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _percent(estimate: Estimate) -> str:
    value = f"{100 * estimate.value:.1f} %"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} (95 % interval {100 * estimate.low:.1f} % to {100 * estimate.high:.1f} %)"


def _plain(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.4g}"
    return f"{estimate.value:.4g} (95 % interval {estimate.low:.4g} to {estimate.high:.4g})"


def _share(count: int, of: int, what: str) -> str:
    return f"{count} of {of} {what}" if of else f"0 {what}"
