"""What each correction would have done with a log's tokens: nobody is trained, the plug-ins are run and looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CorrectionEffect", "TRIED", "correction_effects"]

Array = npt.NDArray[Any]

TRIED: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("none", "no correction", {}),
    ("token_truncated", "token TIS, cap 2", {"cap": 2.0}),
    ("sequence_truncated", "sequence TIS, cap 2", {"cap": 2.0}),
    ("token_masked", "token masked (IcePop), 0.5 to 5", {"low": 0.5, "high": 5.0}),
    ("sequence_masked", "sequence masked, 0.5 to 2", {"low": 0.5, "high": 2.0}),
    (
        "sequence_masked",
        "geometric rejection, 0.99 to 1.01",
        {"low": 0.99, "high": 1.01, "average": "geometric", "weighted": False},
    ),
    ("reject", "reject trajectories, mean k3 above 0.002", {"estimator": "k3", "over": "mean", "high": 0.002}),
    ("veto", "veto trajectories, r below 0.0001", {"below": 1e-4}),
)
"""Plug-in of `keel.algo.correction`, words and options: the usual settings of each (docs/papers.md)."""


@dataclass(frozen=True, slots=True)
class CorrectionEffect:
    """What one correction would have done. Shares are of the compared tokens.

    `masked` leave the loss, `truncated` count less than their ratio because of a cap. `ess` is the effective sample
    size of the weights of what is left, as a share of it; that of the raw ratios stands beside it as `ess_before`.
    """

    id: str
    label: str
    masked: float
    truncated: float
    trajectories_lost: float  # share of trajectories with nothing left
    weight_mean: float  # over what is left; 0 if nothing is
    ess_before: float
    ess: float
    options: Mapping[str, Any] = field(default_factory=dict)


def correction_effects(rollout: Array, learner: Array, trajectory: Array) -> tuple[CorrectionEffect, ...]:
    """The effects of `TRIED` on T drawn tokens; `trajectory [T]` says whose each is. Empty for no tokens."""
    import torch

    from keel.algo import correction
    from keel.algo.correction.base import CorrectionInputs
    from keel.gap.statistics import gap_statistics

    if not rollout.size:
        return ()
    _, owner = np.unique(trajectory, return_inverse=True)
    inputs = CorrectionInputs(
        torch.from_numpy(np.asarray(learner, np.float64)),
        torch.from_numpy(np.asarray(rollout, np.float64)),
        torch.ones(rollout.size, dtype=torch.bool),
        torch.from_numpy(owner.astype(np.int64)),
    )
    before = gap_statistics(rollout, learner)["ess"]
    effects = []
    for name, label, options in TRIED:
        made = getattr(correction, name)(inputs, **options)
        effects.append(_effect(name, label, options, made, owner, before))
    return tuple(effects)


def _effect(
    name: str, label: str, options: Mapping[str, Any], made: Any, owner: Array, before: float
) -> CorrectionEffect:
    kept = np.ones(owner.shape, dtype=bool) if made.keep is None else made.keep.numpy()
    weights = np.ones(owner.shape) if made.weights is None else made.weights.double().numpy()
    left = weights[kept]
    squares = float(np.square(left).sum())
    truncated = made.metrics.get("truncated_share")
    num_trajectories = int(owner.max()) + 1
    return CorrectionEffect(
        name,
        label,
        float(1 - kept.mean()),
        0.0 if truncated is None else float(truncated.double().mean()),
        1 - len(np.unique(owner[kept])) / num_trajectories,
        float(left.mean()) if left.size else 0.0,
        before,
        float(left.sum() ** 2 / (left.size * squares)) if squares else 0.0,
        dict(options),
    )
