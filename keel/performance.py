"""How fast a step learns: tokens per second and device, and which share of the device's arithmetic that is.

    perf/tokens_per_s = tokens of the step's batch / (time/learn_s x devices)
    perf/mfu          = operations of its training passes / (time/learn_s x devices x peak of one device)

Tokens are all that were fed, context included, shared ones too; operations those of the tokens that were computed
(`keel.models.flops`). Scoring, recomputation and the optimizer's step take time and count for nothing, so both figures
are lower than those of a bare training pass.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from keel.config import TrainConfig
from keel.device import resolve_device
from keel.models.policy import DTYPES
from keel.ops.matmul import product

# Dense bfloat16 products per second in 10^12 operations, as the makers' data sheets have them (no sparsity).
CARDS: Mapping[str, float] = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.05,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
PROBE_SIZE, PROBE_ROUNDS = 1024, 4


@dataclass(frozen=True)
class Peak:
    """What one device can do, in 10^12 operations a second; None: unknown, and `source` says why."""

    tflops: float | None
    source: str


UNKNOWN_PEAK = Peak(None, "nobody asked")


def peak_of(config: TrainConfig) -> Peak:
    """The peak that `perf/mfu` is a share of: as the config says, as a card's data sheet does, or measured on a CPU."""
    if config.learner.peak_tflops > 0:
        return Peak(config.learner.peak_tflops, "learner.peak_tflops")
    device, dtype = resolve_device(config.device), DTYPES[config.model.dtype]
    if device.type == "cpu":
        return Peak(_measured(dtype, torch.get_num_threads()), f"measured: a product of {PROBE_SIZE} x {PROBE_SIZE}")
    return peak_of_card(torch.cuda.get_device_name(device), config.model.dtype)


def peak_of_card(name: str, dtype: str) -> Peak:
    """The peak of a CUDA card by its name, in bfloat16 alone."""
    found = next((peak for part, peak in CARDS.items() if part in name), None)
    if found is None or dtype != "bfloat16":
        return Peak(None, f"no figure is known for {name} in {dtype}: set learner.peak_tflops")
    return Peak(found, f"data sheet of {name}, dense bfloat16")


@lru_cache(maxsize=8)
def _measured(dtype: torch.dtype, num_threads: int) -> float:  # noqa: ARG001 (what is measured depends on it)
    left = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype)
    seconds = []
    for make in (partial(product, left, left, rows=PROBE_SIZE), partial(torch.mm, left, left)):
        for _ in range(PROBE_ROUNDS):
            begun = time.perf_counter()
            make()
            seconds.append(time.perf_counter() - begun)
    return float(2 * PROBE_SIZE**3 / min(seconds) / 1e12)


def performance(row: Mapping[str, float], config: TrainConfig, peak: Peak) -> dict[str, float | None]:
    """`perf/*` of a step whose row has `learner/tokens`, `learner/tflop`, `time/learn_s`; of an empty batch, none."""
    tokens, seconds = row.get("learner/tokens", 0.0), row.get("time/learn_s", 0.0)
    if tokens <= 0 or seconds <= 0:
        return {}
    # Ranks on the CPU share one machine.
    devices = 1 if resolve_device(config.device).type == "cpu" else config.learner.ranks
    rate = row["learner/tflop"] / (seconds * devices)
    return {
        "perf/tokens_per_s": tokens / (seconds * devices),
        "perf/mfu": None if peak.tflops is None else rate / peak.tflops,
    }
