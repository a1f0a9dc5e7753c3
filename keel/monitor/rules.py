"""Rules that judge an update before it touches the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from keel.types import Verdict


class Judged(Protocol):
    """What the rules read of a learner's update: the batch's loss and the gradient's norm before clipping."""

    @property
    def loss(self) -> float: ...

    @property
    def grad_norm(self) -> float: ...


class Monitor:
    """Judges updates. A loss or gradient that is not finite is skipped; `max_skips` in a row end the run.

    Its counts are part of a checkpoint (`state`, `restore`), so that a resumed run judges as the undisturbed one.
    """

    def __init__(self, max_skips: int) -> None:
        """`max_skips`: the consecutive skip that ends the run; at least 1."""
        if max_skips < 1:
            raise ValueError(f"Monitor: max_skips got {max_skips}; needs at least 1")
        self.max_skips = max_skips
        self.skips_in_a_row = 0
        self.skips = 0

    def standing(self) -> Verdict:
        """The verdict before the next update: a run that was stopped stays so, unless `max_skips` was raised since."""
        if self.skips_in_a_row < self.max_skips:
            return Verdict("go")
        return Verdict("stop", f"{self.skips_in_a_row} updates in a row were skipped")

    def judge(self, update: Judged) -> Verdict:
        """ "go", "skip" or "stop", with the reason."""
        broken = [
            f"{name} is {value}"
            for name, value in (("loss", update.loss), ("gradient norm", update.grad_norm))
            if not math.isfinite(value)
        ]
        if not broken:
            self.skips_in_a_row = 0
            return Verdict("go")
        self.skips += 1
        self.skips_in_a_row += 1
        reason = " and ".join(broken)
        if self.skips_in_a_row >= self.max_skips:
            return Verdict("stop", f"{reason}; {self.skips_in_a_row} updates in a row were skipped")
        return Verdict("skip", reason)

    def state(self) -> dict[str, int]:
        """What `restore` needs, as JSON values."""
        return {"skips_in_a_row": self.skips_in_a_row, "skips": self.skips}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.skips_in_a_row = int(state["skips_in_a_row"])
        self.skips = int(state["skips"])
