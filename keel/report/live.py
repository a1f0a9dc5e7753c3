"""The report while the run goes on: rewritten now and then, at a cost that is bounded, and never at the run's risk."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from keel.report.write import write_report

MOST_OF_TIME = 0.01
"""Share of a run's time that rewriting may take: after a report that took one second, the next waits a hundred."""
STEPS_ON_THE_WAY = 6
"""Recorded steps read for a report on the way; the one at the end reads more."""


class LiveReport:
    """Rewrites a run's report.html; it takes a step's numbers as trackers do, and looks at the files instead.

    A report is an account of a run and no part of it: whatever goes wrong in writing one is told once, through `tell`,
    and the run goes on.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        every_s: float,
        tell: Callable[[str], None] = warnings.warn,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`every_s`: least seconds between two reports on the way; 0: only at the end."""
        self._run_dir = run_dir
        self._every_s = every_s
        self._tell = tell
        self._clock = clock
        self._due = clock() + every_s
        self._told = False

    def log(self, step: int, metrics: Mapping[str, float | int | None]) -> None:  # noqa: ARG002 (a tracker's method)
        """A step is done: write a report if one is due."""
        if self._every_s > 0 and self._clock() >= self._due:
            began = self._clock()
            self._write(STEPS_ON_THE_WAY)
            ended = self._clock()
            self._due = ended + max(self._every_s, (ended - began) / MOST_OF_TIME)

    def close(self) -> None:
        """The run is over, however it ended: write the last report."""
        self._write(None)

    def _write(self, max_steps: int | None) -> None:
        try:
            if max_steps is None:
                write_report(self._run_dir)
            else:
                write_report(self._run_dir, max_steps=max_steps)
        except Exception as error:  # noqa: BLE001 (nothing that a report does may end a run)
            if not self._told:
                self._told = True
                self._tell(f"the report could not be written, the run goes on: {type(error).__name__}: {error}")
