"""The sentence at the head of the report: what a person who had read everything would say first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

from keel.monitor.bands import MISMATCH
from keel.report.difference import success_difference
from keel.report.findings import SOLVED, Finding
from keel.report.plain import cut, number, without_secrets
from keel.report.source import REINFORCEMENT

Row = Mapping[str, Any]
Level = Literal["good", "warn", "bad", "running"]

LOSS_NOTE = (
    "A policy loss near 0, of either sign, is right here. Advantages are measured against the mean of each group, so "
    "within a group they cancel, and with the ratio at exactly 1 the loss is only their weighted mean. Its value says "
    "nothing about progress; its gradient does the work. Read held-out success and reward instead."
)
CLIP_NOTE = (
    "A clip fraction of 0 is right here. With one update per batch the policy that learns is the policy that is "
    "compared with, so the ratio is exactly 1 and clipping has nothing to clip. What engine and learner compute "
    "differently is shown as mismatch and never enters the ratio."
)
MAX_FINDINGS = 12


@dataclass(frozen=True, slots=True)
class Ending:
    """How far a run came: its `state` ("completed", "running", "crashed", ...), `reason`, steps done and planned."""

    state: str
    reason: str
    done: int
    planned: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Did it learn? `kind` "better", "worse", "solved" or "unclear" ("none": nothing to go by), and the figures."""

    kind: Literal["better", "worse", "solved", "unclear", "none"]
    text: str


def verdict(
    ending: Ending, rows: Sequence[Row], found: Sequence[Finding], evaluations: Sequence[Row]
) -> dict[str, Any]:
    """`{"level", "text", "first_bad_step", "first_bad_stage", "first_bad_train_step", "rules"}`.

    `first_bad_step` counts within its stage, as links and files do; it is null unless a finding is bad.
    """
    gained = progress(rows, evaluations)
    bad = next((finding for finding in found if finding.severity == "bad"), None)
    row = bad.row if bad is not None else None
    return {
        "level": _level(ending, rows, found, gained),
        "text": " ".join(_sentences(ending, rows, found, gained)),
        "first_bad_step": row["step"] if row else None,
        "first_bad_stage": row["stage"] if row else None,
        "first_bad_train_step": row["train_step"] if row else None,
        "rules": [finding.rule for finding in found],
    }


def notes(
    rows: Sequence[Row], found: Sequence[Finding], *, updates_per_batch: int, problems: Sequence[str]
) -> list[str]:
    """What keeps a reader from taking something right for a fault, other findings, and what could not be read."""
    said = [_said(finding) for finding in found if finding.severity == "note" or finding is not found[0]]
    if len(said) > MAX_FINDINGS:
        said = [*said[:MAX_FINDINGS], f"{len(said) - MAX_FINDINGS} more findings are left out here."]
    trained = [row for row in rows if row["stage"] == REINFORCEMENT]
    if trained and updates_per_batch == 1:
        said += [LOSS_NOTE]
        if all(number(row.get("policy/clip_fraction")) in (None, 0) for row in trained):
            said += [CLIP_NOTE]
    still = sum(number(row.get("policy/grad_norm")) == 0 for row in trained)
    if still:
        said.append(
            f"On {still:,} of {len(trained):,} steps the gradient was 0: in no group did rewards differ, so there was "
            "nothing to learn, and nothing moved."
        )
    if problems:
        shown = "; ".join(cut(problem, 300) for problem in problems[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        said.append(f"Not everything could be read: {shown}{more}.")
    return said


def recorded_notes(evaluations: Sequence[Row]) -> list[str]:
    """What was measured after the run, `MAX_FINDINGS` at most, the newest last. The verdict knows nothing of it."""
    newest = sorted(evaluations, key=lambda row: number(row.get("unix_s"), 14) or 0.0)[-MAX_FINDINGS:]
    said = []
    for row in newest:
        tasks, share = number(row.get("num_tasks")), number(row.get("success"))
        value, name = (share, "success") if share is not None else (number(row.get("reward")), "reward")
        low, high = number(row.get(f"{name}_low")), number(row.get(f"{name}_high"))
        shown = _percent if name == "success" else "{:.4g}".format
        interval = f" (95 % interval {shown(low)} to {shown(high)})" if low is not None and high is not None else ""
        found = "nothing" if value is None else f"{name} {shown(value)}{interval}"
        where = f"{cut(str(row.get('model')), 80)} on {cut(str(row.get('env')), 80)}, {tasks or 0:,} tasks"
        said.append(f"Evaluated afterwards ({cut(str(row.get('name')), 80)}): {where}: {found}.")
    return said


def progress(rows: Sequence[Row], evaluations: Sequence[Row]) -> Progress:
    """From held-out success before and after reinforcement if there is any, else from early and late rewards."""
    measured = [row for row in evaluations if number(row.get("success")) is not None]
    named = {row["name"]: row for row in measured}
    first = named.get("after_warm_start") or (measured[0] if measured else None)
    if first is not None and first is not measured[-1]:
        last = measured[-1]
        tasks = number(last.get("num_tasks"))
        of = f" ({tasks:,} tasks)" if tasks else ""
        text = f"held-out success {_percent(first['success'])} → {_percent(last['success'])}{of}"
        apart = success_difference(first, last)
        if apart is not None and apart.differs:
            return Progress("better" if apart.value > 0 else "worse", text)
        return Progress("solved" if last["success"] >= SOLVED else "unclear", text)
    trained = [row for row in rows if row["stage"] == REINFORCEMENT]
    if trained:
        return _trend([value for row in trained if (value := number(row.get("reward/mean"))) is not None], "reward", 1)
    return _trend(
        [value for row in rows if (value := number(row.get("policy/loss"))) is not None], "supervised loss", -1
    )


def _trend(values: Sequence[float], name: str, sign: int) -> Progress:
    """Early mean against late mean, in standard errors: three of them are a change."""
    width = max(5, len(values) // 10)
    if len(values) < 2 * width:
        return Progress("none", f"{name} {values[-1]:.3g}" if values else "")
    early, late = values[:width], values[-width:]
    error = (stdev(early) ** 2 / width + stdev(late) ** 2 / width) ** 0.5
    text = f"{name} {fmean(early):.3g} → {fmean(late):.3g}"
    change = (fmean(late) - fmean(early)) * sign
    if abs(change) <= 3 * error or change == 0:
        return Progress("unclear", text)
    return Progress("better" if change > 0 else "worse", text)


def _level(ending: Ending, rows: Sequence[Row], found: Sequence[Finding], gained: Progress) -> Level:
    if any(finding.severity == "bad" for finding in found) or ending.state in ("failed", "crashed", "stopped"):
        return "bad"
    warned = any(finding.severity == "warn" for finding in found)
    if ending.state in ("running", "starting"):
        return "warn" if warned else "running"
    if warned or not rows or ending.state != "completed" or gained.kind in ("worse", "unclear", "none"):
        return "warn"
    return "good"


def _sentences(ending: Ending, rows: Sequence[Row], found: Sequence[Finding], gained: Progress) -> list[str]:
    told = [_ended(ending)] if ending.state != "completed" else []
    if any(finding.rule == "planted_faults" for finding in found):
        told.append("Faults were planted in it on purpose.")
    if not rows:
        return [*told, "No step has finished, so there is nothing to judge yet."]
    worst = found[0] if found and found[0].severity != "note" else None
    if worst is not None and worst.severity == "bad":
        told.append(_said(worst))
        return [*told, f"{gained.text[0].upper()}{gained.text[1:]}."] if gained.text else told
    facts = [gained.text, *_soundness(rows)]
    told.append(f"{_summary(ending, gained)}: {', '.join(fact for fact in facts if fact)}.")
    return [*told, _said(worst)] if worst is not None else told


def _said(finding: Finding) -> str:
    return f"{finding.what}{_where(finding)}: {finding.text}."


def _summary(ending: Ending, gained: Progress) -> str:
    so_far = " so far" if ending.state != "completed" else ""
    return {
        "better": f"Sound and learning{so_far}",
        "solved": f"Sound{so_far}, and little is left to learn",
        "worse": f"Sound in its numbers{so_far}, but getting worse",
        "unclear": f"Sound{so_far}, but no progress shows",
        "none": f"Sound{so_far}, but too short to say whether it learns",
    }[gained.kind]


def _ended(ending: Ending) -> str:
    at = f"after {ending.done:,} of {ending.planned:,} steps" if ending.planned else f"after {ending.done:,} steps"
    because = f": {cut(without_secrets(ending.reason), 400).rstrip('.')}" if ending.reason else ""
    return {
        "running": f"Running, {ending.done:,} of {ending.planned:,} steps done.",
        "starting": "Starting.",
        "stopped": f"Stopped by the monitor {at}{because}.",
        "interrupted": f"Interrupted {at}; keel resume continues it.",
        "failed": f"Crashed {at}{because}.",
        "crashed": f"Ended without a word {at}: killed, out of memory, or the machine went down.",
    }.get(ending.state, f"Its state is unknown {at}{because}.")


def _soundness(rows: Sequence[Row]) -> list[str]:
    """The figures behind "sound": the ratio, and the gap between engine and learner."""
    facts = []
    deviations = [value for row in rows if (value := number(row.get("policy/ratio_max_dev"))) is not None]
    if deviations:
        facts.append(f"ratio exactly 1 on {deviations.count(0):,} of {len(deviations):,} steps")
    gaps = [value for row in rows if (value := number(row.get(MISMATCH))) is not None]
    if gaps:
        facts.append(f"engine-learner gap {fmean(gaps):.0e} nats")
    return facts


def _where(finding: Finding) -> str:
    if finding.row is None:
        return ""
    stage = "" if finding.row["stage"] == REINFORCEMENT else "warm-start "
    return f" at {stage}step {finding.row['step']:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
