"""What the report takes from a run directory, in the shape it counts on, whatever the files say.

A row of a damaged or foreign run may lack its step or hold anything under any name. Such rows are mended where that is
safe (a missing number is the row's place) and left out where it is not, so that nothing behind this module has to ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keel.config import TrainConfig
from keel.monitor.rows import RunDirectoryError
from keel.report.plain import cut
from keel.runs import Run
from keel.secrecy import scrubbed

STAGES = ("warm_start", "reinforcement")
REINFORCEMENT = "reinforcement"
MAX_ALARMS = 400

Row = dict[str, Any]


def step_rows(run: Run) -> list[Row]:
    """Step rows in order, each with `train_step`, `step` (integers), `stage` (one of `STAGES`) and `not_finite`."""
    rows: list[Row] = []
    for row in run.rows_of("step"):
        stage = row.get("stage", REINFORCEMENT)
        if stage not in STAGES:
            continue
        broken = row.get("not_finite")
        rows.append(
            {
                **row,
                "stage": stage,
                "train_step": whole(row.get("train_step"), len(rows) + 1),
                "step": whole(row.get("step"), len(rows)),
                "not_finite": {str(name): cut(str(value), 40) for name, value in broken.items()}
                if isinstance(broken, Mapping)
                else {},
            }
        )
    return rows


def alarm_rows(run: Run) -> list[Row]:
    """The first `MAX_ALARMS` alarms as the page takes them."""
    return [
        {
            "train_step": whole(row.get("train_step"), 0),
            "stage": cut(str(row.get("stage", "")), 40),
            "step": whole(row.get("step"), 0),
            "rule": cut(str(row.get("rule", "")), 80),
            "severity": row["severity"] if row.get("severity") in ("warn", "skip", "stop") else "warn",
            "text": cut(scrubbed(str(row.get("text", ""))), 2_000),
            "first_step": whole(row.get("first_step"), whole(row.get("step"), 0)),
        }
        for row in run.alarms[:MAX_ALARMS]
    ]


def config_of(run: Run) -> TrainConfig | None:
    """The run's config, or None if it cannot be read; the reason is then among the run's problems."""
    try:
        return run.config
    except RunDirectoryError as error:
        problem = str(error).splitlines()[0]
        if problem not in run.problems:
            run.problems.append(problem)
        return None


def whole(value: Any, instead: int) -> int:
    """`value` if it is an integer that a page can count with."""
    usable = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53
    return int(value) if usable else instead
