"""How a run ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from keel import config_load
from keel.monitor import cells, directory, live
from keel.monitor.printable import one_line
from keel.monitor.rows import read_json
from keel.secrecy import scrubbed

State = Literal["starting", "running", "completed", "stopped", "interrupted", "failed"]


@dataclass(frozen=True, slots=True)
class RunSummary:
    """How a run ended: `state` "completed", "stopped" by the monitor or "interrupted" by the user (with `reason`);
    `steps` rows of training; `eval`: metrics of each named evaluation; `alarms`: how many of each rule; `seconds` per
    stage."""

    run_dir: str
    state: State
    reason: str = ""
    steps: int = 0
    eval: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    alarms: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """How the run went and where it lies: the last lines of `keel train`."""
        lines = [_held_out(name, metrics) for name, metrics in self.eval.items()]
        if self.seconds:
            lines.append("time: " + ", ".join(f"{name} {live.duration(value)}" for name, value in self.seconds.items()))
        if self.alarms:
            lines.append("alarms: " + ", ".join(f"{rule} {count}" for rule, count in self.alarms.items()))
        lines.append(f"{self.state}: {self.run_dir}" + (f" ({self.reason})" if self.reason else ""))
        return "\n".join(one_line(scrubbed(line)) for line in lines)

    def _repr_html_(self) -> str:
        named: dict[str, object] = {"reason": self.reason or None, "directory": self.run_dir, "steps": self.steps}
        named |= {f"success, {name}": live.success_share(metrics) for name, metrics in self.eval.items()}
        named |= {f"alarms: {rule}": count for rule, count in self.alarms.items()}
        named |= {f"time, {name}": live.duration(seconds) for name, seconds in self.seconds.items()}
        return cells.facts(f"run {self.state}", named)


def _held_out(name: str, metrics: Mapping[str, float]) -> str:
    """An evaluation's success with its interval, or its reward where the environment does not say what a success is."""
    tasks = f"{live.number(metrics['num_tasks'])} tasks"
    share = live.success_share(metrics)
    if share is None:
        return f"held-out reward {name}: {live.number(metrics['reward'])} ({tasks})"
    return f"held-out success {name}: {share.removesuffix(')')}, {tasks})"


def completed_run(run_dir: Path) -> RunSummary | None:
    """The summary of a run that has nothing left to do, else None. Raises RunDirectoryError if it is no run."""
    paths = directory.reopen(run_dir)
    if not paths.status.exists() or read_json(paths.status)["state"] != "completed":
        return None
    written = read_json(paths.summary)
    config = config_load.parse(config_load.read_text(paths.config), str(paths.config), resolve_plugins=False)
    if written["steps"] < config.steps:
        return None  # given more steps since
    reason = "it was complete before; nothing was done"
    known = ("steps", "eval", "alarms", "seconds")
    return RunSummary(str(run_dir), "completed", reason, **{name: written[name] for name in known})
