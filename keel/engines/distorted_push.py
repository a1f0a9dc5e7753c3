"""Faults of pushes: weights that come late, leave a group out, or arrive otherwise than they were sent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from keel.distortion import Distortion, DistortionError
from keel.models.distorted.weights import WeightChanges, check_group, in_group, mixed_with_old
from keel.sync.base import WeightSource
from keel.sync.transports import WEIGHTS_FILE, transfer_places, weights_directory, write_weights

Weights = dict[str, torch.Tensor]


class DistortedPush:
    """What becomes of pushed weights on their way. The first push is the start: nothing is older than it."""

    def __init__(self, distortions: Sequence[Distortion], config: Any) -> None:
        """`config` is the model's `transformers` configuration."""
        self._changes = WeightChanges(distortions, config)
        self._groups = [each for each in distortions if each.cause == "stale_tensor_group"]
        self._late = sum(int(each.strength) for each in distortions if each.cause == "stale_version")
        self._history: list[Weights] = []
        self._first: Weights = {}

    def __bool__(self) -> bool:
        """Whether anything is planted in pushes."""
        return bool(self._changes or self._groups or self._late)

    @contextmanager
    def distorted(self, source: WeightSource, version: int) -> Iterator[WeightSource]:
        """In this context, a source of the weights as they arrive; under the new number, whatever they are."""
        if not self:
            yield source
            return
        if source.kind != "file":
            raise DistortionError(f"load_weights: got source {source.kind!r}; faults of weights need 'file'")
        sent, header = _read(source.location)
        with weights_directory(transfer_places()[0]) as location:
            write_weights(location, self._arriving(sent), **{**header, "version": version})
            yield WeightSource("file", location)

    def _arriving(self, sent: Weights) -> Weights:
        if self._groups and not self._first:
            for each in self._groups:
                check_group(each, list(sent))
            self._first = {name: sent[name] for each in self._groups for name in sent if in_group(each, name)}
        weights: Mapping[str, torch.Tensor] = sent
        if self._late:
            self._history = [*self._history[-self._late :], sent]
            weights = self._history[0]
        return {name: self._changes.apply(name, self._with_old(name, tensor)) for name, tensor in weights.items()}

    def _with_old(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        for each in self._groups:
            if in_group(each, name):
                tensor = mixed_with_old(tensor, self._first[name], each.strength)
        return tensor


def _read(location: str) -> tuple[Weights, dict[str, Any]]:
    """All tensors at `location`, and the header's values."""
    with safe_open(str(Path(location) / WEIGHTS_FILE), framework="pt", device="cpu") as file:
        header = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
