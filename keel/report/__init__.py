"""A run directory as a page to look at. Reads files only: no torch, no code of the run.

`report_data` is what the page shows, `write_report` the page itself, `compare_data` what sets two runs apart.
"""

from __future__ import annotations

from keel.report.compare import compare_data
from keel.report.data import report_data
from keel.report.write import write_report

__all__ = ["compare_data", "report_data", "write_report"]
