"""Where a run's time went, from its rows and their times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from keel.report.plain import number

Row = Mapping[str, Any]

PHASES = (
    ("waiting for episodes", "time/rollout_wait_s"),
    ("learning", "time/learn_s"),
    ("publishing weights", "time/publish_s"),
)
PAUSE_S = 60.0
"""A gap between rows that is longer than this, and than twenty ordinary ones, is a pause: the run was not running."""


def time_spent(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """`[{"phase", "seconds"}]` of step and evaluation rows in file order, pauses of a resumed run left out.

    Phases of a step are measured by the loop. What lies between one row and the next and belongs to no step is an
    evaluation if that is what the row is, and checkpoints, records and the log otherwise.
    """
    timed = [row for row in rows if row.get("kind") in ("step", "eval") and number(row.get("unix_s"), 14) is not None]
    found = [(name, sum(number(row.get(metric)) or 0.0 for row in timed)) for name, metric in PHASES]
    steps = [row for row in timed if row["kind"] == "step"]
    inside = sum((number(row.get("time/step_s")) or 0.0) for row in steps)
    gaps = [(after["kind"], _gap(before, after)) for before, after in pairwise(timed)]
    usual = median([gap for kind, gap in gaps if kind == "step"] or [0.0])
    running = [(kind, gap) for kind, gap in gaps if kind == "eval" or gap <= max(PAUSE_S, 20 * usual)]
    between = sum(gap for kind, gap in running if kind == "step")
    found.append(("evaluation", sum(gap for kind, gap in running if kind == "eval")))
    found.append(("checkpoints, records, other", between + max(0.0, inside - sum(seconds for _, seconds in found[:3]))))
    return [{"phase": name, "seconds": number(seconds)} for name, seconds in found if number(seconds) and seconds > 0]


def _gap(before: Row, after: Row) -> float:
    """Seconds between two rows that the second one's own step does not account for."""
    own = (number(after.get("time/step_s")) or 0.0) if after["kind"] == "step" else 0.0
    return max(0.0, float(after["unix_s"]) - float(before["unix_s"]) - own)
