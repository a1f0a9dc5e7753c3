"""vLLM's own start / update / finish protocol, with Keel's way of writing in the middle.

Started with `--weight-transfer-config '{"backend": "keel"}'`, a server takes `/start_weight_update`, `/update_weights`
with `{"location": directory}` (or `{"address": ...}` of a broadcast) and `/finish_weight_update`. vLLM's built-in
backends go through the stock reload instead, which leaves GPT-OSS's sinks and experts as they were.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

BACKEND = "keel"


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing is needed before the first update."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One of the two: a directory with weights.safetensors, or the address of a broadcast."""

    location: str = ""
    address: str = ""


class KeelTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Hands an update to the calls of the worker extension."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to set up: a broadcast's group is made for it."""

    def start_weight_update(self) -> None:
        """Nothing to prepare: modules are written where they are."""

    def finish_weight_update(self) -> None:
        """Nothing is left to do: an update is complete when it returns."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """vLLM's own waits for an accelerator afterwards, which a CPU has none of."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Raises RuntimeError with what the extension says if the weights were not taken."""
        from .extension import WorkerExtension

        worker: Any = _Worker(self.vllm_config, self.model)
        if update_info.location:
            answer = WorkerExtension.keel_load_file(worker, update_info.location)
        else:
            answer = WorkerExtension.keel_load_broadcast(worker, update_info.address)
        if answer["problem"]:
            raise RuntimeError(answer["problem"])

    def shutdown(self) -> None:
        """Nothing is held between updates."""


class _Worker:
    """As much of a worker as the extension's calls need."""

    def __init__(self, vllm_config: Any, model: torch.nn.Module) -> None:
        self.vllm_config, self._model = vllm_config, model
        self.model_runner = self

    def get_model(self) -> torch.nn.Module:
        return self._model


def register() -> None:
    """Make the backend known; the module may be imported more than once in a process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, KeelTransferEngine)
