"""What is wrong with a run: rules over its rows, each with the first step at which it shows.

A rule says one thing, from the numbers alone. Thresholds are wide: a finding is something that a person would want to
be told of, not every wobble. Alarms that the monitor raised during the run are findings too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, pstdev
from typing import Any, Literal

from keel.monitor.bands import MISMATCH, Band
from keel.report.plain import cut, number
from keel.report.source import REINFORCEMENT

Row = Mapping[str, Any]
Severity = Literal["note", "warn", "bad"]

ENTROPY_FLOOR = 0.02
"""Nats per token below which a policy has all but stopped exploring."""
LEAST_SIGNAL = 0.1
SOLVED = 0.9
"""A mean success from which little variety among attempts is what success looks like."""


@dataclass(frozen=True, slots=True)
class Finding:
    """`text` completes "<what> at step 37: ..."; `row` is the first that shows it (None: the run as a whole)."""

    rule: str
    severity: Severity
    what: str
    text: str
    row: Row | None = None


def find(
    rows: Sequence[Row], alarms: Sequence[Row], healthy: Mapping[str, Band], *, updates_per_batch: int
) -> list[Finding]:
    """All findings, bad ones first, notes last, each kind by the step at which it begins."""
    trained = [row for row in rows if row["stage"] == REINFORCEMENT]
    found = [
        not_finite(rows),
        ratio_left_one(rows) if updates_per_batch == 1 else None,
        recompute_differs(rows),
        mismatch_outside(trained, healthy),
        reward_collapsed(trained),
        entropy_collapsed(trained),
        entropy_erupted(trained),
        worlds_failed(trained),
        episodes_truncated(trained),
        no_signal(trained),
    ]
    present = [finding for finding in found if finding is not None]
    known = {finding.rule for finding in present}
    present += [finding for finding in from_alarms(rows, alarms) if finding.rule not in known]
    severity = ("bad", "warn", "note").index
    return sorted(present, key=lambda each: (severity(each.severity), each.row["train_step"] if each.row else 2**53))


def not_finite(rows: Sequence[Row]) -> Finding | None:
    """A value that is not a number. One in hundreds is skipped and survived; several are a broken run."""
    broken = [row for row in rows if row["not_finite"]]
    if not broken:
        return None
    named = {"policy/grad_norm": "the gradient", "policy/loss": "the loss"}
    names = [named.get(name, name) for name in broken[0]["not_finite"]]
    subject = " and ".join(dict.fromkeys(sorted(names, key=lambda name: name not in named.values())[:2]))
    verb = "were" if " and " in subject else "was"
    bad = len(broken) >= 3 or len(broken) * 100 > len(rows) or broken[-1] is rows[-1]
    text = f"{subject} {verb} not finite ({_of(len(broken), len(rows))})"
    return Finding("not_finite", "bad" if bad else "warn", "Broken" if bad else "A stumble", text, broken[0])


def ratio_left_one(rows: Sequence[Row]) -> Finding | None:
    """With one update per batch the ratio is 1 by construction; anything else is a fault of the program."""
    off = [row for row in rows if number(row.get("policy/ratio_max_dev"))]
    if not off:
        return None
    text = f"the ratio left 1 by up to {_most(off, 'policy/ratio_max_dev'):.2g} though each batch has one update"
    return Finding("ratio", "bad", "Broken", f"{text} ({_of(len(off), len(rows))})", off[0])


def recompute_differs(rows: Sequence[Row]) -> Finding | None:
    """Two passes over the same micro-batches with the same weights must agree to the bit."""
    off = [row for row in rows if number(row.get("policy/recompute_max_dev"))]
    if not off:
        return None
    most = _most(off, "policy/recompute_max_dev")
    text = f"a second pass over the same tokens differed by up to {most:.2g} in the ratio ({_of(len(off), len(rows))})"
    return Finding("recompute", "bad" if most > 1e-3 else "warn", "Not reproducible", text, off[0])


def mismatch_outside(rows: Sequence[Row], healthy: Mapping[str, Band]) -> Finding | None:
    """Engine and learner disagree more than rounding explains. Near-ties of a router that explain all outliers do."""
    limit = healthy[MISMATCH].healthy_max
    seen = [row for row in rows if number(row.get(MISMATCH)) is not None]
    over = [row for row in seen if row[MISMATCH] > limit and not _all_routed(row)]
    if not over:
        return None
    most = _most(over, MISMATCH)
    eruption = most > 10 * limit
    if len(over) < max(3, len(seen) // 50) and not eruption:
        return None
    text = (
        f"engine and learner disagree by up to {most:.2g} nats a token, healthy is {limit:.0e} "
        f"({_of(len(over), len(seen))})"
    )
    return Finding("mismatch", "bad" if eruption else "warn", "Engine and learner part", text, over[0])


def reward_collapsed(rows: Sequence[Row]) -> Finding | None:
    """A smoothed reward that lost half of all it had gained, by more than its noise, and did not come back."""
    curve = _smoothed(rows, "reward/mean")
    if len(curve) < 10:
        return None
    values = [value for value, _ in curve]
    peak = max(range(len(values)), key=values.__getitem__)
    middle = (values[peak] + min(values[: peak + 1])) / 2
    noise = _noise([value for row in rows if (value := number(row.get("reward/mean"))) is not None])
    low = fmean(values[-max(1, len(values) // 20) :])
    fell = values[peak] - low
    if low >= middle or fell < max(3 * noise, 0.05 * abs(values[peak]), 1e-9):
        return None
    start = next(index for index in range(peak, len(values)) if max(values[index:]) < middle)
    text = f"reward fell from {values[peak]:.3g} to {low:.3g} and did not come back"
    return Finding("reward_collapse", "bad", "Collapsed", text, curve[start][1])


def entropy_collapsed(rows: Sequence[Row]) -> Finding | None:
    """Next to no entropy although the tasks are not solved: attempts are alike, and nothing more is learned."""
    curve = _smoothed(rows, "policy/entropy")
    if len(curve) < 10 or _late_mean(rows, "success", "reward/mean") >= SOLVED:
        return None
    start, end = curve[0][0], curve[-1][0]
    if end > ENTROPY_FLOOR or end > 0.1 * start:
        return None
    first = next(row for value, row in curve if value <= ENTROPY_FLOOR and value <= 0.1 * start)
    text = f"entropy fell from {start:.2g} to {end:.2g} nats a token while tasks are still unsolved"
    return Finding("entropy_collapse", "bad", "Stopped exploring", text, first)


def entropy_erupted(rows: Sequence[Row]) -> Finding | None:
    """Entropy that grows past three times its start, and by a nat, is a policy that forgets how to write."""
    curve = _smoothed(rows, "policy/entropy")
    if len(curve) < 10:
        return None
    start, end = curve[0][0], curve[-1][0]
    limit = max(3 * start, start + 1.0)
    if end <= limit:
        return None
    first = next(row for value, row in curve if value > limit)
    return Finding(
        "entropy_eruption", "bad", "Unravelled", f"entropy rose from {start:.2g} to {end:.2g} nats a token", first
    )


def worlds_failed(rows: Sequence[Row]) -> Finding | None:
    """Environment or engine spoilt more than one episode in twenty."""

    def share(row: Row) -> float:
        episodes = number(row.get("rollout/episodes"))
        return (number(row.get("rollout/failed")) or 0.0) / episodes if episodes else 0.0

    overall = fmean(share(row) for row in rows) if rows else 0.0
    if overall <= 0.05:
        return None
    first = next(row for row in rows if share(row) > 0.05)
    text = f"{overall:.0%} of episodes were spoilt by the environment or the engine; they are in no statistic"
    return Finding("failed", "bad" if overall > 0.5 else "warn", "Episodes fail", text, first)


def episodes_truncated(rows: Sequence[Row]) -> Finding | None:
    """More than half of late episodes ran into a length or turn limit."""
    late = rows[-20:]
    counts = [(number(row.get("rollout/truncated")) or 0.0, number(row.get("rollout/episodes")) or 0.0) for row in late]
    episodes = sum(count for _, count in counts)
    share = sum(cut_off for cut_off, _ in counts) / episodes if episodes else 0.0
    if share <= 0.5:
        return None
    text = f"{share:.0%} of the last episodes were cut by a length or turn limit; rollout.max_* may be too small"
    return Finding("truncated", "warn", "Cut short", text, late[0])


def no_signal(rows: Sequence[Row]) -> Finding | None:
    """Fewer than a tenth of late groups have rewards that differ, and not because the tasks are solved."""
    late = [row for row in rows[-20:] if number(row.get("rollout/signal_share")) is not None]
    if len(late) < 3 or _late_mean(rows, "success", "reward/mean") >= SOLVED:
        return None
    share = fmean(row["rollout/signal_share"] for row in late)
    if share >= LEAST_SIGNAL:
        return None
    text = f"only {share:.0%} of the last groups have attempts whose rewards differ; the others teach nothing"
    return Finding("no_signal", "warn", "Little to learn from", text, late[0])


def from_alarms(rows: Sequence[Row], alarms: Sequence[Row]) -> list[Finding]:
    """What the monitor said at the time, once for each rule: its first stop, or its first alarm.

    An alarm that warned or skipped an update and did not end the run is a note: what came of it the rows tell.
    """
    by_step = {(row["stage"], row["step"]): row for row in rows}
    found: dict[str, Finding] = {}
    for alarm in alarms:
        severity: Severity = "bad" if alarm["severity"] == "stop" else "note"
        if alarm["rule"] in found and (severity == "note" or found[alarm["rule"]].severity == "bad"):
            continue
        row = by_step.get((alarm["stage"], alarm["first_step"])) or by_step.get((alarm["stage"], alarm["step"]))
        what = "Stopped" if alarm["severity"] == "stop" else "Alarm"
        text = cut(" ".join(alarm["text"].split()), 300).rstrip(".")
        found[alarm["rule"]] = Finding(alarm["rule"], severity, what, text, row)
    return list(found.values())


def _all_routed(row: Row) -> bool:
    outliers, routed = number(row.get("mismatch/outliers")), number(row.get("mismatch/outliers_routed"))
    return bool(outliers) and outliers == routed


def _of(count: int, total: int) -> str:
    return f"{count:,} of {total:,} steps"


def _most(rows: Sequence[Row], name: str) -> float:
    return max(abs(value) for row in rows if (value := number(row.get(name))) is not None)


def _smoothed(rows: Sequence[Row], name: str) -> list[tuple[float, Row]]:
    """Means over a sliding window of a twentieth of the rows (at least 5), each with the last row of its window."""
    points = [(value, row) for row in rows if (value := number(row.get(name))) is not None]
    width = max(5, len(points) // 20)
    total = sum(value for value, _ in points[:width])
    curve = [(total / width, points[width - 1][1])] if len(points) >= width else []
    for index in range(width, len(points)):
        total += points[index][0] - points[index - width][0]
        curve.append((total / width, points[index][1]))
    return curve


def _noise(values: Sequence[float]) -> float:
    """Standard deviation of a value about the curve, from differences of neighbours, which a trend hardly moves."""
    steps: list[float] = [after - before for before, after in pairwise(values)]
    return pstdev(steps) / 2**0.5 if len(steps) > 1 else 0.0


def _late_mean(rows: Sequence[Row], *names: str) -> float:
    """Mean over the last twenty rows of the first metric that they have."""
    for name in names:
        values = [value for row in rows[-20:] if (value := number(row.get(name))) is not None]
        if values:
            return fmean(values)
    return 0.0
