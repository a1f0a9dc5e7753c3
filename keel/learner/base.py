"""What a learner is to the training loop: plain values in, plain values out, in one process or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from keel.batch import PackedBatch
from keel.config import Stage
from keel.sync.base import WeightSource
from keel.types import Fault, Verdict


class LearnerError(Fault, RuntimeError):
    """The learner was used out of order, or one of its processes is gone; says what, and how to fix it."""


@dataclass(frozen=True, slots=True)
class Update:
    """What a gradient looks like before it is applied. The gradient itself stays in the learner.

    `serial` ties it to that gradient; `last` says that applying it ends the training step. `loss` is what
    `algo.reduction` makes of the update's loss tokens, `grad_norm` the global norm before clipping, `finite` whether
    both are numbers. An update of no loss tokens is finite, zero and changes nothing. `streams` are what the learner
    itself computed of each micro-batch, by the micro-batch's index in the batch: `logprobs [T]` and `entropy [T]`,
    float32, detached, and `importance_weights [T]` where a correction is made inside the loss.
    """

    serial: int
    index: int
    last: bool
    loss: float
    grad_norm: float
    finite: bool
    num_loss_tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    streams: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)


class LearnerLike(Protocol):
    """A learner: one process (`Learner`) or several ranks (`LearnerGroup`)."""

    @property
    def step(self) -> int:
        """Training steps done, over all stages; a skipped one is done too."""
        ...

    @property
    def version(self) -> int:
        """Optimizer steps applied: changes exactly when the weights do."""
        ...

    @property
    def stage(self) -> Stage | None: ...

    def enter(self, stage: Stage) -> None: ...

    def score(self, batch: PackedBatch) -> PackedBatch: ...

    def backward(self, batch: PackedBatch, update_index: int = 0) -> Update: ...

    def apply(self, update: Update, verdict: Verdict) -> dict[str, float]: ...

    def weights_to(self, source: WeightSource) -> None: ...

    def weight_names(self) -> tuple[str, ...]: ...

    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> tuple[tuple[float, ...], ...]: ...

    def change_weights(self, names: Sequence[str], change: Literal["noise", "zero"], seed: int) -> None: ...

    def restore_weights(self) -> None: ...

    def export(self, path: str | Path) -> None: ...

    def save(self, path: str | Path, extra: Mapping[str, Any]) -> None: ...

    def load(self, path: str | Path) -> dict[str, Any]: ...

    def close(self) -> None: ...
