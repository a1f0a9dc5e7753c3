"""What is going on in a run: its directory, its numbers, its display, and the rules that judge a gradient. No torch."""

from keel.monitor.rules import Monitor
from keel.monitor.runlog import RunLog
from keel.monitor.summary import RunSummary
from keel.monitor.wilson import success_metrics, wilson_interval

__all__ = ["Monitor", "RunLog", "RunSummary", "success_metrics", "wilson_interval"]
