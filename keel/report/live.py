"""The report while the run goes on: rewritten now and then, at a cost that is bounded, and never at the run's risk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from keel.config import ReportConfig
from keel.runs import load_run

MOST_OF_TIME = 0.005
"""Share of a run's time that rewriting may take: after a report that took one second, the next waits two hundred."""
ON_THE_WAY = {"max_steps": 6, "max_bytes": 7_500_000}
"""A report on the way shows less, and costs a third."""


class LiveReport:
    """Rewrites a run's report.html; it takes a step's numbers as trackers do, and looks at the files instead.

    A report is an account of a run and no part of it: whatever goes wrong in writing one is told once, through `tell`,
    and the run goes on.
    """

    def __init__(
        self,
        run_dir: Path,
        config: ReportConfig,
        *,
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._tell = tell
        self._clock = clock
        self._due = clock() + config.every_s
        self._told = False

    def log(self, step: int, metrics: Mapping[str, float | int | None]) -> None:  # noqa: ARG002 (a tracker's method)
        """A step is done: write a report if one is due."""
        if self._config.every_s == 0 or self._clock() < self._due:
            return
        began = self._clock()
        self._write(**ON_THE_WAY)
        ended = self._clock()
        self._due = ended + max(self._config.every_s, (ended - began) / MOST_OF_TIME)

    def close(self) -> None:
        """The run is over, however it ended: write the last report."""
        if self._config.at_end:
            self._write()

    def _write(self, **limits: int) -> None:
        try:
            from keel.report.write import write_report  # here, so that a broken installation costs the report alone

            write_report(self._run_dir, None, **limits)
        except Exception as error:  # noqa: BLE001 (nothing that a report does may end a run)
            if not self._told:
                self._told = True
                self._tell(f"the report could not be written, the run goes on: {type(error).__name__}: {error}")


def complete_report(run_dir: Path, *, tell: Callable[[str], None]) -> None:
    """The last report of a completed run that was killed before it could be written; else nothing."""
    report, summary = run_dir / "report.html", run_dir / "summary.json"
    if report.exists() and report.stat().st_mtime_ns >= summary.stat().st_mtime_ns:
        return
    LiveReport(run_dir, load_run(run_dir).config.report, tell=tell).close()
