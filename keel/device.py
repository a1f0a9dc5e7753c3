"""Which device a run computes on, what records call it, and how much memory it has and takes.

Nothing is chosen behind the user's back: "auto" is the first CUDA card that torch sees, else the CPU, and a card that
is asked for by name and is not there is an error, never the CPU instead.
"""

from __future__ import annotations

import os

import torch

from keel.config import TrainConfig
from keel.config_problems import ConfigError, Problem, shown
from keel.monitor.memory import machine_bytes, resident_bytes

MIB = 2**20


def resolve_device(name: str) -> torch.device:
    """The device that `device = name` means on this machine. Raises ConfigError for a card that is not there."""
    return rank_devices(name, 1)[0]


def seen_device(name: str) -> torch.device | None:
    """The device that `device = name` means on this machine, None if it is not there: for plans of runs elsewhere."""
    try:
        return resolve_device(name)
    except ConfigError:
        return None


def rank_devices(name: str, num_ranks: int) -> tuple[torch.device, ...]:
    """One device for each of `num_ranks` learner processes: cards 0, 1, ... or the CPU for all.

    Raises ConfigError if there are fewer cards than ranks.
    """
    return choose_devices(name, num_ranks, torch.cuda.device_count() if torch.cuda.is_available() else 0)


def choose_devices(name: str, num_ranks: int, num_cards: int) -> tuple[torch.device, ...]:
    """`rank_devices` on a machine whose torch sees `num_cards` CUDA cards."""
    if name == "cpu" or (name == "auto" and num_cards == 0):
        return (torch.device("cpu"),) * num_ranks
    if num_cards == 0:
        cause = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no CUDA card"
        fix = 'set device = "cpu" or "auto"; for a card, check its driver and install a torch built for CUDA'
        raise ConfigError([Problem("device", f"{name} is asked for and not there: {cause}", shown(name), fix)])
    first = int(name.partition(":")[2] or 0)
    if first + num_ranks > num_cards:
        what = (
            f"{num_ranks} learner rank(s) from card {first} on need {first + num_ranks} cards, torch sees {num_cards}"
        )
        fix = f'name a card below {num_cards}, lower learner.ranks, or set device = "cpu"'
        raise ConfigError([Problem("device", what, shown(name), fix)])
    return tuple(torch.device("cuda", first + rank) for rank in range(num_ranks))


def prepare_device(device: torch.device) -> None:
    """Settings that must stand before the first work on `device`."""
    if device.type == "cuda":
        # cuBLAS repeats its bits on several streams only with a workspace of a fixed size, read when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(device)


def describe_device(device: torch.device) -> str:
    """What decides bits: "cpu", or "cuda (NVIDIA H200)"; the number of the card does not."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"


def total_bytes(device: torch.device) -> int:
    """All the memory of `device`; of the CPU, that of the machine (or the container, where that has less)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_bytes()


def frees_cache(config: TrainConfig, device: torch.device) -> bool:
    """Whether the engine gives its keys and values back while the learner learns on the same `device`.

    Where rollouts go on meanwhile they are needed, and on the CPU taking them again costs more than it is worth.
    """
    wanted = config.engine.free_cache
    return wanted == "on" or (wanted == "auto" and device.type == "cuda" and config.rollout.max_staleness == 0)


class MemoryWatch:
    """`memory/*` of a step, in MiB: what the process holds, and on CUDA the peak of each phase."""

    def __init__(self, device: torch.device, key_value_bytes: int) -> None:
        """`key_value_bytes`: what the engine's keys and values take while it samples."""
        self._cuda = device if device.type == "cuda" else None
        self._values = {"memory/key_values_mib": key_value_bytes / MIB}
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)

    def lap(self, phase: str) -> None:
        """End `phase` ("rollout", "learn"): on CUDA its peak, `memory/<phase>_peak_mib`, is taken."""
        if self._cuda is not None:
            self._values[f"memory/{phase}_peak_mib"] = torch.cuda.max_memory_allocated(self._cuda) / MIB
            torch.cuda.reset_peak_memory_stats(self._cuda)

    def total(self) -> dict[str, float]:
        """All figures of the step, with what is held now."""
        held = {"memory/resident_mib": resident_bytes() / MIB}
        if self._cuda is not None:
            held["memory/allocated_mib"] = torch.cuda.memory_allocated(self._cuda) / MIB
        return {**self._values, **held}
