"""Rules that judge an update before it touches the weights, and rules that watch the steps of a run.

A rule is a small object: it is fed each finished step's metrics and may raise an alarm. Its memory is part of a
checkpoint, and it reads nothing that a clock decides, so a resumed run alarms as the undisturbed one.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from keel.config_monitor import MonitorConfig
from keel.monitor.signal import Metrics, Outcomes, likely_causes, percent
from keel.types import Verdict

SIGNAL_WINDOW = 5
REPEAT_AFTER = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Alarm:
    """Something in a run that its owner should know of: `rule` names who raised it, `text` says what was seen and what
    to do, `first_step` is the step of the stage at which it began. A "skip" or "stop" was carried out already."""

    rule: str
    severity: Literal["warn", "skip", "stop"]
    text: str
    first_step: int


class Judged(Protocol):
    """What the rules read of a learner's update: the batch's loss and the gradient's norm before clipping."""

    @property
    def loss(self) -> float: ...

    @property
    def grad_norm(self) -> float: ...


class Rule(Protocol):
    """Watches the steps of a run."""

    @property
    def name(self) -> str: ...

    def watch(self, stage: str, step: int, metrics: Metrics) -> Alarm | None:
        """What step number `step` of `stage` gives cause for; called once for every step, in order."""
        ...

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        ...


class Monitor:
    """Judges updates and watches steps.

    A loss or gradient that is not finite is skipped; `max_skips` in a row end the run. Its counts and its rules' memory
    are part of a checkpoint (`state`, `restore`), so that a resumed run judges as the undisturbed one.
    """

    def __init__(self, max_skips: int, rules: Sequence[Rule] = ()) -> None:
        """`max_skips`: the consecutive skip that ends the run; at least 1."""
        if max_skips < 1:
            raise ValueError(f"Monitor: max_skips got {max_skips}; needs at least 1")
        self.max_skips = max_skips
        self.rules = tuple(rules)
        self.skips_in_a_row = 0
        self.skips = 0
        self._judged: list[Verdict] = []  # of this step, other than "go"

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
        verdict = Verdict("skip", " and ".join(broken))
        if self.skips_in_a_row >= self.max_skips:
            verdict = Verdict("stop", f"{verdict.reason}; {self.skips_in_a_row} updates in a row were skipped")
        self._judged.append(verdict)
        return verdict

    def watch(self, stage: str, step: int, metrics: Metrics) -> list[Alarm]:
        """The alarms of a finished step: one for each update that was not taken, and what the rules have to say."""
        alarms = [Alarm("not_finite", _severity(verdict), verdict.reason, step) for verdict in self._judged]
        self._judged.clear()
        raised = (rule.watch(stage, step, metrics) for rule in self.rules)
        return [*alarms, *(alarm for alarm in raised if alarm is not None)]

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""
        rules = {rule.name: rule.state() for rule in self.rules}
        return {"skips_in_a_row": self.skips_in_a_row, "skips": self.skips, "rules": rules}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. A rule that was not there when it was saved begins with an empty memory."""
        self.skips_in_a_row = int(state["skips_in_a_row"])
        self.skips = int(state["skips"])
        self._judged.clear()
        known = state.get("rules", {})
        for rule in self.rules:
            if rule.name in known:
                rule.restore(known[rule.name])


def _severity(verdict: Verdict) -> Literal["skip", "stop"]:
    return "stop" if verdict.stops else "skip"


class NoSignal:
    """Warns when too few groups of the last `SIGNAL_WINDOW` reinforcement steps carry a signal.

    The window keeps one poor step from shouting. The warning comes again after `REPEAT_AFTER` steps if nothing has
    changed; not earlier even if the share rose above the limit and fell again.
    """

    name = "no_signal"

    def __init__(self, min_share: float) -> None:
        """`min_share`: the share of groups below which it warns."""
        self._min_share = min_share
        self._window: deque[Outcomes] = deque(maxlen=SIGNAL_WINDOW)
        self._first_step: int | None = None  # since when the share has been too low
        self._warned_at: int | None = None

    def watch(self, stage: str, step: int, metrics: Metrics) -> Alarm | None:
        if stage != "reinforcement":
            return None  # demonstrations come one to a group, and are imitated, not compared
        self._window.append(Outcomes.of(metrics))
        if len(self._window) < SIGNAL_WINDOW:
            return None
        seen = sum(self._window, Outcomes())
        if seen.signal_share >= self._min_share:
            self._first_step = None
            return None
        if self._first_step is None:
            self._first_step = step - SIGNAL_WINDOW + 1
        if self._warned_at is not None and step - self._warned_at < REPEAT_AFTER:
            return None
        self._warned_at = step
        return Alarm(self.name, "warn", self._tell(seen, self._first_step), self._first_step)

    def _tell(self, seen: Outcomes, first_step: int) -> str:
        share = f"{seen.with_signal} of {seen.groups} groups ({percent(seen.signal_share)})"
        causes = likely_causes(seen)
        return (
            f"only {share} of the last {SIGNAL_WINDOW} steps carry a signal to learn from, since step {first_step}: "
            f"{'; '.join(cause.seen for cause in causes)}. What to do: {'; '.join(cause.advice for cause in causes)}"
        )

    def state(self) -> dict[str, Any]:
        window = [dataclasses.asdict(outcomes) for outcomes in self._window]
        return {"window": window, "first_step": self._first_step, "warned_at": self._warned_at}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._window = deque((Outcomes(**values) for values in state["window"]), maxlen=SIGNAL_WINDOW)
        self._first_step, self._warned_at = state["first_step"], state["warned_at"]


def make_monitor(config: MonitorConfig, also: Sequence[Rule] = ()) -> Monitor:
    """The monitor of the config's `[monitor]` section, with the rules of `also` behind its own."""
    rules: list[Rule] = [NoSignal(config.min_signal_share)] if config.min_signal_share > 0 else []
    return Monitor(config.max_skips, [*rules, *also])
