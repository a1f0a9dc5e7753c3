"""Engine and learner that part warn while the run goes on, not in its report alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keel.monitor.bands import MISMATCH, Band
from keel.monitor.rules import REPEAT_AFTER, Alarm
from keel.monitor.signal import Metrics


class EngineApart:
    """Warns at the first step whose mean gap is above the band, and again every `REPEAT_AFTER` that are.

    Tokens of an older policy are no measure: with staleness the gap is partly what the policy has learned since.
    """

    name = "engine_apart"

    def __init__(self, band: Band) -> None:
        self._band = band
        self._steps = 0  # above the band since the last warning; 0: none was given yet
        self._first_step: int | None = None

    def watch(self, stage: str, step: int, metrics: Metrics) -> Alarm | None:
        gap = metrics.get(MISMATCH)
        if gap is None or stage != "reinforcement" or metrics.get("policy/staleness"):
            return None
        if gap <= self._band.healthy_max:  # a NaN is above
            self._steps, self._first_step = 0, None
            return None
        if self._first_step is None:
            self._first_step = step
        self._steps = self._steps % REPEAT_AFTER + 1
        if self._steps > 1:
            return None
        return Alarm(
            self.name,
            "warn",
            f"engine and learner give the tokens of step {step} log-probs that differ by {gap:.2g} nats in the mean "
            f"({self._band.text}). What to do: `keel preflight` with this run's config names the cause, "
            "`keel mismatch` shows the worst tokens",
            self._first_step,
        )

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps, "first_step": self._first_step}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._steps, self._first_step = int(state["steps"]), state["first_step"]
