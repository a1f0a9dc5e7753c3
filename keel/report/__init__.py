"""A run directory as a page to look at. Reads files only: no torch, no code of the run.

`report_data` is what the page shows, `write_report` the page itself, `compare_data` what sets two runs apart. They are
imported when first used: a run that is to be reported on does not wait for a chart library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keel.report.compare import compare_data
    from keel.report.data import report_data
    from keel.report.write import write_report

__all__ = ["compare_data", "report_data", "write_report"]

_FROM = {"compare_data": "compare", "report_data": "data", "write_report": "write"}


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module 'keel.report' has no attribute {name!r}")
    return getattr(importlib.import_module(f"keel.report.{_FROM[name]}"), name)
