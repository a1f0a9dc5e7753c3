"""What the two ends of a weight transfer look like: plain values and protocols, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from keel.types import Fault


class SyncError(Fault, RuntimeError):
    """Weights could not be moved, or did not fit where they were to go; the message names the tensors."""


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where new weights lie. `kind` "shared": the learner's own storage, nothing moves; "file": a directory of
    safetensors at `location`."""

    kind: Literal["shared", "file"]
    location: str = ""


class WeightSender(Protocol):
    """A learner, as far as publishing goes: `weights_to` leaves its current weights at `source`."""

    def weights_to(self, source: WeightSource) -> None: ...


class WeightReceiver(Protocol):
    """An engine, as far as publishing goes. `capabilities()` returns an object with `name`, `shares_weights` and
    `weight_sources`."""

    def capabilities(self) -> Any: ...

    async def load_weights(self, source: WeightSource, version: int) -> None: ...
