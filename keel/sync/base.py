"""What the two ends of a weight transfer look like: plain values and protocols, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from keel.types import Fault


class SyncError(Fault, RuntimeError):
    """Weights could not be moved, or did not fit where they were to go; the message names the tensors."""


WeightKind = Literal["shared", "file", "gloo", "nccl"]


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where new weights lie. `kind` "shared": the learner's own storage, nothing moves; "file": a directory of
    safetensors at `location`; "gloo", "nccl": a broadcast by the learner, `location` is a `channel.Address` as text."""

    kind: WeightKind
    location: str = ""


class WeightSender(Protocol):
    """A learner, as far as publishing goes: `weights_to` leaves its current weights at `source`."""

    def weights_to(self, source: WeightSource) -> None: ...


class WeightReceiver(Protocol):
    """An engine, as far as publishing goes. `capabilities()` returns an object with `name`, `shares_weights`,
    `weight_sources`, `weight_receivers` and `weight_problem`."""

    def capabilities(self) -> Any: ...

    async def load_weights(self, source: WeightSource, version: int) -> None: ...
