"""A run with faults planted on purpose says so for as long as it lives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keel.monitor.rules import REPEAT_AFTER, Alarm
from keel.monitor.signal import Metrics


class PlantedFaults:
    """Warns at the first step, and again every `REPEAT_AFTER`, if the rows say that faults are planted."""

    name = "planted_faults"

    def __init__(self) -> None:
        self._steps = 0  # seen since the last warning; 0: none was given yet

    def watch(self, stage: str, step: int, metrics: Metrics) -> Alarm | None:  # noqa: ARG002  (the protocol's)
        counts = {side: int(metrics.get(f"faults/{side}") or 0) for side in ("engine", "learner")}
        if not any(counts.values()):
            return None
        self._steps = self._steps % REPEAT_AFTER + 1
        if self._steps > 1:
            return None
        told = " and ".join(f"{count} in the {side}" for side, count in counts.items() if count)
        return Alarm(
            self.name,
            "warn",
            f"faults are planted on purpose ({told}); trust nothing in this run. What to do: leave engine.distortions "
            "and learner.distortions out",
            step,
        )

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._steps = int(state["steps"])
