"""An adapter's factors added to the base that the server was started from.

Only factors travel. The base of an adapted matrix is read from the server's own checkpoint every time (it lies in the
page cache, so this costs no memory), because on a CPU vLLM keeps no plain copy, and a merged one must not be merged
again. Products and sums are float32, rounded once to the server's type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .plan import Plan, WeightsRefusedError, listed

INDEX = "model.safetensors.index.json"


def merged(
    entries: Sequence[Mapping[str, Any]],
    factors: Mapping[str, torch.Tensor],
    base: Callable[[str], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The adapted weights, by name: base + scale * up @ down, with base's shape and type.

    An entry has `weight` (whose name it is), `down` and `up` (names of factors), `scale`, `num_experts` (0: a matrix)
    and `swapped` (experts laid out [E, out, in] instead of [E, in, out]).
    """
    result = {}
    for entry in entries:
        weight = base(entry["weight"])
        down, up = factors[entry["down"]].float(), factors[entry["up"]].float()
        if entry["num_experts"]:
            down = down.view(entry["num_experts"], -1, down.shape[1])  # [E, r, in]
            up = up.view(up.shape[0], -1, entry["num_experts"])  # [out, r, E]
            delta = torch.einsum("ore,eri->eoi" if entry["swapped"] else "ore,eri->eio", up, down)
        else:
            delta = up @ down
        result[entry["weight"]] = (weight.float() + entry["scale"] * delta).to(weight.dtype)
    return result


class BaseWeights:
    """The checkpoint that the server was started from, by the learner's in-memory names."""

    def __init__(self, model_config: Any) -> None:
        """Raises WeightsRefusedError if its safetensors cannot be found."""
        self._dtype = model_config.dtype
        self._directory = _directory(model_config)
        self._files: dict[str, str] = {}
        index = self._directory / INDEX
        if index.is_file():
            self._files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            for path in sorted(self._directory.glob("*.safetensors")):
                with safe_open(str(path), framework="pt", device="cpu") as file:
                    self._files |= dict.fromkeys(file.keys(), path.name)
        if not self._files:
            raise WeightsRefusedError(f"no safetensors in {self._directory}, so the adapter has no base to be added to")

    def get(self, name: str, plan: Plan) -> torch.Tensor:
        """The tensor called `name` in memory, in the server's type; experts that lie apart are put together."""
        with ExitStack() as stack:
            opened: dict[str, Any] = {}

            def read(stored: str) -> torch.Tensor:
                file = self._files.get(stored)
                if file is None:
                    raise WeightsRefusedError(f"{stored} is not in the checkpoint {self._directory}")
                if file not in opened:
                    path = str(self._directory / file)
                    opened[file] = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                tensor: torch.Tensor = opened[file].get_tensor(stored)
                return tensor.to(self._dtype)

            tensor = read(name) if name in self._files else _fused_experts(name, plan, read)
        if tuple(tensor.shape) != plan.targets[name].shape:
            raise WeightsRefusedError(
                f"{name} in {self._directory} is {list(tensor.shape)}; is that the adapter's base?"
            )
        return tensor


def check_entries(entries: Sequence[Mapping[str, Any]], found: Mapping[str, Any], plan: Plan) -> None:
    """Raise WeightsRefusedError unless every factor belongs to an entry and every entry to a weight that there is."""
    named = {entry[end] for entry in entries for end in ("down", "up")}
    if named != set(found):
        raise WeightsRefusedError(
            f"adapter: factors without a weight, or missing: {listed(sorted(named ^ set(found)))}"
        )
    if unknown := sorted({entry["weight"] for entry in entries} - set(plan.targets)):
        raise WeightsRefusedError(f"adapter: vLLM's model has no {listed(unknown)}")


def _fused_experts(name: str, plan: Plan, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Files hold Qwen's experts one by one, gate and up apart; in memory they are [E, 2 x inner, hidden]."""
    parent, _, leaf = name.rpartition(".")
    number = plan.targets[name].shape[0]
    if leaf == "gate_up_proj":
        parts = [
            torch.cat([read(f"{parent}.{index}.{half}_proj.weight") for half in ("gate", "up")])
            for index in range(number)
        ]
    else:
        parts = [read(f"{parent}.{index}.{leaf}.weight") for index in range(number)]
    return torch.stack(parts)


def _directory(model_config: Any) -> Path:
    path = Path(model_config.model)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True))
