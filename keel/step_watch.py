"""What a training step is doing and what that takes: its phase for those who watch, seconds and memory for its row."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType

from keel.device import MemoryWatch
from keel.monitor.progress import Phase, Progress

PARTS: Mapping[Phase, str] = {
    "collect": "rollout",
    "pack": "learn",
    "score": "learn",
    "backward": "learn",
    "optimizer": "learn",
    "publish": "publish",
}
"""The part of a step, as its row names it, that a phase belongs to. What is recorded of a step is not in its row."""
TIMED = ("learn", "publish")  # the collector times its own work, which may overlap with the other parts
HALVES: Mapping[Phase, str] = {"pack": "score", "score": "score", "backward": "update", "optimizer": "update"}
"""What learning is made of: what comes before the first gradient, and the updates."""
MEASURED = ("rollout", "learn")


class StepWatch:
    """One step, from now on. A part ends when a phase of another begins: `time/<part>_s` are its seconds, and on CUDA
    `memory/<part>_peak_mib` its peak. Learning is told apart as `time/score_s` and `time/update_s` as well."""

    def __init__(
        self, progress: Progress, memory: MemoryWatch, also: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """`also` stands in the row of every step."""
        self._also = also
        self._progress = progress
        self._memory = memory
        self._seconds: dict[str, float] = {}
        self._part = self._half = ""
        self._began = self._last = self._half_began = time.perf_counter()

    def enter(self, phase: Phase, **sizes: int) -> None:
        """The step begins `phase`, with a batch of `sizes` if they are new."""
        self._progress.enter(phase, **sizes)
        now = time.perf_counter()
        self._enter_half(HALVES.get(phase, ""), now)
        part = PARTS.get(phase, "")
        if part == self._part:
            return
        if self._part in TIMED:
            self._seconds[f"time/{self._part}_s"] = now - self._last
        if self._part in MEASURED:
            self._memory.lap(self._part)
        self._part, self._last = part, now

    def _enter_half(self, half: str, now: float) -> None:
        if half == self._half:
            return
        if self._half:
            self._seconds[f"time/{self._half}_s"] = now - self._half_began
        self._half, self._half_began = half, now

    def figures(self) -> dict[str, float]:
        """The step's seconds by part and in all, its memory, and what else is in every row."""
        total = {"time/step_s": time.perf_counter() - self._began}
        return {**self._seconds, **total, **self._memory.total(), **self._also}
