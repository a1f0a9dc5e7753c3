"""The random states of a process as tensors and JSON values: nothing pickled."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_random_states(seed: int) -> None:
    """Start torch's, Python's and numpy's global generators from `seed`: a world may draw from any of them."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def random_states(device: torch.device) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, JSON values) of torch's, Python's and numpy's global generators."""
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    tensors["numpy"] = torch.from_numpy(np.asarray(keys, dtype=np.uint32).view(np.uint8).copy())
    values = {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), int(position), int(has_gauss), float(cached)],
    }
    return tensors, values


def restore_random_states(tensors: dict[str, torch.Tensor], values: dict[str, Any], device: torch.device) -> None:
    """Continue every generator where `random_states` found it."""
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    name, position, has_gauss, cached = values["numpy"]
    keys = tensors["numpy"].numpy().view(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))  # noqa: NPY002
