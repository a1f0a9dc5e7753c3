"""What a preflight found: plain values that turn into JSON and back, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from keel.causes import CAUSES, Side
from keel.monitor import cells
from keel.monitor.printable import one_line

Status = Literal["pass", "warn", "fail", "skip"]
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer.

    `figure` is what was measured and `threshold` what it is held against, in `unit` ("nats", "tokens", "GiB", ...);
    None where the check is not a number. `reason` says why in one sentence, `fix` what to do ("" if it passed).
    `details` is JSON that the page may show.
    """

    id: str
    title: str
    status: Status
    reason: str
    figure: float | None = None
    threshold: float | None = None
    unit: str = ""
    fix: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Attribution:
    """How much of the gap goes away if `cause` (a key of `keel.causes.CAUSES`, or "unexplained") is undone.

    `side` is who is at fault, told by a third, independent reference. `gap_before` and `gap_after` are mean absolute
    differences of log-probs in nats; `explained` is the share that went away, 0 to 1. `layer` where one layer is to
    blame, `strength` the fitted size of the fault (a temperature, a number of versions, ...), `group` a tensor group.
    """

    cause: str
    side: Side | None
    explained: float
    gap_before: float
    gap_after: float
    layer: int | None = None
    strength: float | None = None
    group: str = ""
    text: str = ""


@dataclass(frozen=True, slots=True)
class GapSample:
    """Per-token gaps of the engine's log-probs to the learner's, as drawn by the plots.

    `engine` and `learner` are log-probs of the same tokens; `position` in the sequence, `sequence` which one. `text` is
    the token's, where a tokenizer is known. At most a few thousand tokens; `num_tokens` is how many were measured.
    """

    engine: tuple[float, ...]
    learner: tuple[float, ...]
    position: tuple[int, ...]
    sequence: tuple[int, ...]
    text: tuple[str, ...] = ()
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PreflightResult:
    """All checks in the order they ran, the gap and what explains it.

    `stack` describes what was checked (model, engine, attention, dtype, sampling, device); `gap` holds statistics of
    the per-token gap by name (`abs_mean`, `abs_p50`, `abs_p99`, `abs_max`, `k1`, `k3`, ...), `noise` the level that
    healthy rounding alone would give.
    """

    stack: Mapping[str, Any]
    checks: tuple[Check, ...]
    attribution: tuple[Attribution, ...] = ()
    gap: Mapping[str, float] = field(default_factory=dict)
    noise: float | None = None
    sample: GapSample | None = None
    duration_s: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> Status:
        """ "fail" if any check failed, else "warn" if any warned, else "pass"; skipped checks decide nothing."""
        found = {check.status for check in self.checks}
        return "fail" if "fail" in found else "warn" if "warn" in found else "pass"

    @property
    def causes(self) -> tuple[str, ...]:
        """What explains the gap, the largest share first."""
        return tuple(each.cause for each in self.attribution if each.cause != "unexplained")

    def __str__(self) -> str:
        """One line per check, what explains the gap, and the verdict."""
        checks = [f"{check.status}  {check.title}: {check.reason}" for check in self.checks]
        told = [f"{each.explained:.0%} of the gap: {_name_of(each)}" for each in self.attribution]
        return "\n".join(one_line(line, limit=600) for line in (*checks, *told, f"{self.verdict}: {headline(self)}"))

    def _repr_html_(self) -> str:
        checks = ((each.status, each.title, each.figure, each.threshold, each.reason, each.fix) for each in self.checks)
        told = ((_name_of(each), f"{each.explained:.0%}", each.gap_before, each.gap_after) for each in self.attribution)
        columns = ("", "check", "figure", "threshold", "why", "what to do")
        return "".join(
            (
                cells.table(f"{self.verdict}: {headline(self)}", columns, checks),
                cells.table("what explains the gap", ("cause", "explains", "before", "after"), told),
            )
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for `json.dumps`."""
        return {"schema_version": SCHEMA_VERSION, "verdict": self.verdict, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PreflightResult:
        """What `to_json` made. Raises ValueError for another schema version."""
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"preflight result: schema version {data.get('schema_version')!r}, this Keel reads {SCHEMA_VERSION}"
            )
        values = {name: value for name, value in data.items() if name not in ("schema_version", "verdict")}
        sample = values.get("sample")
        tuples: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in (sample or {}).items()
        }
        return cls(
            **{
                **values,
                "checks": tuple(Check(**each) for each in values["checks"]),
                "attribution": tuple(Attribution(**each) for each in values["attribution"]),
                "sample": GapSample(**tuples) if sample is not None else None,
            }
        )


def headline(result: PreflightResult) -> str:
    """The verdict as a sentence or two: fit or not, and the likeliest reason."""
    named = [each for each in result.attribution if each.cause in CAUSES]
    reasons = "; ".join(_because(each) for each in named[:3])
    because = f" Likely reason: {reasons}." if reasons else ""
    failed = [check for check in result.checks if check.status == "fail"]
    warned = [check for check in result.checks if check.status == "warn"]
    if failed:
        also = f" {len(failed)} of {len(result.checks)} checks failed, first: {failed[0].title.lower()}."
        return f"Not fit for on-policy training.{because or also}"
    if warned:
        return f"Fit with reservations: {warned[0].reason.rstrip('.')}.{because}"
    passed = sum(check.status == "pass" for check in result.checks)
    skipped = sum(check.status == "skip" for check in result.checks)
    left = f"; {skipped} could not be asked" if skipped else ""
    return f"Fit for on-policy training: {passed} checks passed{left}."


def _name_of(each: Attribution) -> str:
    cause = CAUSES.get(each.cause)
    parts = (cause.title if cause else each.cause, each.side and f"in the {each.side}", each.group)
    return ", ".join(part for part in parts if part)


def _because(each: Attribution) -> str:
    side = f" in the {each.side}" if each.side else ""
    share = f", which explains {100 * each.explained:.0f} % of the gap" if math.isfinite(each.explained) else ""
    return f"{CAUSES[each.cause].title}{side}{share}"
