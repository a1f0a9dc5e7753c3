"""Numbers of a step's rollouts, under the names of the run directory (docs/loop.md)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from keel.secrecy import scrubbed
from keel.types import Group, Trajectory

MAX_NAME = 80
_NOT_PLAIN = re.compile(r"[^\w.+@%=:/ -]")


def rollout_metrics(groups: Sequence[Group], seconds: float) -> dict[str, float]:
    """Metrics of one step whose episodes took `seconds`, first to last, whether or not anybody waited for them.

    `rollout/failed`, `rollout/malformed` (replies) and `rollout/truncated` are counts; `rollout/tokens` are those
    drawn; `rollout/signal_share` is the share of groups in which rewards differ (the others teach nothing). Means are
    over attempts that the world did not spoil.
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    num_drawn = sum(trajectory.num_policy_tokens for trajectory in trajectories)
    metrics = {
        **outcome_metrics(trajectories),
        "rollout/groups": float(len(groups)),
        "rollout/signal_share": _mean([float(has_signal(group)) for group in groups]),
        "rollout/tokens": float(num_drawn),
        "rollout/tokens_per_s": num_drawn / seconds if seconds > 0 else 0.0,
        "time/rollout_s": seconds,
    }
    return metrics


def outcome_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """What became of some episodes: the part of `rollout_metrics` that evaluation shares.

    `success` is there if any episode says whether it succeeded; one that does not say has then not.
    """
    kept = [trajectory for trajectory in trajectories if not trajectory.failed]
    malformed = [turn for t in kept for turn in t.turns if turn.malformed is not None and turn.finish_reason == "stop"]
    metrics = {
        "reward/mean": _mean([trajectory.reward for trajectory in kept]),
        "rollout/episodes": float(len(trajectories)),
        "rollout/failed": float(len(trajectories) - len(kept)),
        "rollout/malformed": float(len(malformed)),
        "rollout/truncated": float(sum(trajectory.status == "truncated" for trajectory in kept)),
        "rollout/turns": _mean([float(len(trajectory.turns)) for trajectory in kept]),
        "rollout/episode_tokens": _mean([float(trajectory.num_tokens) for trajectory in kept]),
        "rollout/generate_s": _mean([sum(turn.generate_s for turn in trajectory.turns) for trajectory in kept]),
        "rollout/env_s": _mean([sum(turn.env_s for turn in trajectory.turns) for trajectory in kept]),
    }
    if any(trajectory.success is not None for trajectory in kept):
        metrics["success"] = _mean([float(bool(trajectory.success)) for trajectory in kept])
    for status in ("env_error", "env_timeout", "engine_error"):
        metrics[f"rollout/{status}"] = float(sum(trajectory.status == status for trajectory in trajectories))
    metrics.update(_own_metrics(kept))
    return metrics


def has_signal(group: Group) -> bool:
    """Do the rewards of its kept attempts differ? (Then there are at least two.)"""
    return len({trajectory.reward for trajectory in group.kept}) > 1


def max_staleness(groups: Iterable[Group], policy_version: int) -> int:
    """How many versions behind `policy_version` the oldest drawn token is; 0 if there is none."""
    versions = (
        span.policy_version
        for group in groups
        for trajectory in group.kept
        for segment in trajectory.segments
        for span in segment
        if span.policy_version is not None
    )
    return policy_version - min(versions, default=policy_version)


def _own_metrics(kept: Sequence[Trajectory]) -> dict[str, float]:
    """The environment's own metrics and reward parts: means over the episodes, 0 where one does not give it.

    A name becomes part of a column's: `column_name`.
    """
    names = sorted({name for trajectory in kept for name in trajectory.metrics})
    parts = sorted({name for trajectory in kept for name in trajectory.reward_parts})
    return {
        **{column_name("env", name): _mean([float(t.metrics.get(name, 0.0)) for t in kept]) for name in names},
        **{column_name("reward", name): _mean([float(t.reward_parts.get(name, 0.0)) for t in kept]) for name in parts},
    }


def column_name(kind: str, name: str) -> str:
    """ "env/turns_used": letters, digits and a few signs of the environment's `name`, at most 80 characters.

    A name that had to be changed ends in a hash of itself: two never become one. "reward/mean" is the run's own.
    """
    plain = _NOT_PLAIN.sub("_", scrubbed(name))[:MAX_NAME]
    if plain == name and plain and f"{kind}/{plain}" != "reward/mean":
        return f"{kind}/{plain}"
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
    return f"{kind}/{plain[: MAX_NAME - 9]}~{digest}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
