"""`keel rollout`: some episodes before a run: is there a signal to learn from, and what would a step take?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from keel.types import Group

if TYPE_CHECKING:
    from keel.build import EnvSource
    from keel.config import TrainConfig
    from keel.rewards.base import Reward


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """What some episodes told: the episodes themselves, and figures under the names of docs/loop.md."""

    groups: tuple[Group, ...]
    metrics: Mapping[str, float]


def rollout(
    config: TrainConfig,
    *,
    num_tasks: int = 4,
    env: EnvSource | None = None,
    reward: Reward | None = None,
    with_learner: bool = True,
) -> RolloutResult:
    """Play `rollout.group_size` attempts at each of `num_tasks` training tasks, and judge what there is to learn.

    `env` and `reward` stand in for the config's. `with_learner` packs the groups and runs them through the learner,
    score and gradient, once, without applying anything.
    """
    raise NotImplementedError
