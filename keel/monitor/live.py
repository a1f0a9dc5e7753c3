"""A run as it goes: a live display on a terminal, a plain line now and then elsewhere.

Nothing shown is ever read as markup or as terminal control codes, whoever wrote it: a model, a task, a user.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from keel.monitor.printable import one_line, printable
from keel.secrecy import scrubbed

Metrics = Mapping[str, float | int | None]
Clock = Callable[[], float]

SHOWN = (
    ("reward/mean", "reward"),
    ("success", "success"),
    ("policy/ratio_max_dev", "ratio off 1 by"),
    ("mismatch/abs_mean", "mismatch"),
    ("policy/entropy", "entropy"),
    ("policy/grad_norm", "gradient norm"),
    ("policy/loss", "loss"),
    ("rollout/tokens_per_s", "tokens/s"),
    ("rollout/failed", "failed episodes"),
)
OF_EPISODES = ("reward/mean", "success", "rollout/tokens_per_s", "rollout/failed")
LINE_EVERY_S = 10.0
NOTES_SHOWN = 5
NOTE_LIMIT = 4000  # characters of a note that are shown


class Display(Protocol):
    """Shows a run's stages, steps and notes."""

    def begin(self, stage: str, total: int) -> None: ...

    def step(self, stage: str, step: int, metrics: Metrics) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


def open_display(mode: Literal["auto", "on", "off"], title: str) -> Display:
    """`mode` "auto": live if standard output is a terminal, else lines."""
    if mode == "on" or (mode == "auto" and sys.stdout.isatty()):
        return LiveDisplay(title, Console())
    return LineDisplay(sys.stdout)


def describe(metrics: Metrics) -> str:
    """Numbers in one line: "success 0.52, num_tasks 512"."""
    return ", ".join(f"{one_line(name)} {number(value)}" for name, value in metrics.items())


def success_share(metrics: Mapping[str, object]) -> str | None:
    """`success` of an evaluation in words, with its interval; None if the environment does not say what one is."""
    value, low, high = (metrics.get(name) for name in ("success", "success_low", "success_high"))
    if not isinstance(value, (int, float)):
        return None
    if not isinstance(low, (int, float)) or not isinstance(high, (int, float)):
        return f"{100 * value:.1f} %"
    return f"{100 * value:.1f} % (95 % interval {100 * low:.1f} % to {100 * high:.1f} %)"


def describe_evaluation(metrics: Metrics) -> str:
    """An evaluation in one line: success with its interval, reward, tasks, failed episodes. The rest is in its row."""
    share = success_share(metrics)
    parts = [] if share is None else [f"success {share}"]
    told = (("reward", "reward {}"), ("num_tasks", "{} tasks"), ("failed", "{} failed"))
    return ", ".join([*parts, *(text.format(number(metrics[name])) for name, text in told if name in metrics)])


def shown_metrics(stage: str, metrics: Metrics) -> dict[str, float | int | None]:
    """What a step's display shows, by metric. The episodes of a warm start are demonstrations, which say nothing of the
    policy; that no episode failed goes without saying.
    """
    left_out = set(OF_EPISODES) if stage == "warm_start" else set[str]()
    if not metrics.get("rollout/failed"):
        left_out.add("rollout/failed")
    return {name: metrics[name] for name, _ in SHOWN if name in metrics and name not in left_out}


def number(value: float | None) -> str:
    """A number short enough to be read in passing."""
    if value is None:
        return "-"
    if value == int(value if abs(value) < 1e15 else 0):
        return f"{int(value):,}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as "45 s", "3 min 05 s" or "2 h 07 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Pace:
    """Time left in a stage, from the steps seen so far in this process (a resumed stage begins in the middle)."""

    def __init__(self, total: int, clock: Clock) -> None:
        self.total = total
        self._clock = clock
        self._began = clock()
        self._first: int | None = None

    def left(self, step: int) -> float:
        """Seconds until step `total - 1` is done, after `step` was."""
        if self._first is None:
            self._first = step
        done = step - self._first + 1
        return (self._clock() - self._began) / done * max(0, self.total - step - 1)


class LineDisplay:
    """One plain line at a stage's first and last step and every `LINE_EVERY_S` seconds between."""

    def __init__(self, out: TextIO, clock: Clock = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._pace = Pace(0, clock)
        self._stage = ""
        self._last_line: float | None = None

    def begin(self, stage: str, total: int) -> None:
        self._stage = stage
        self._pace = Pace(total, self._clock)
        self._last_line = None

    def step(self, stage: str, step: int, metrics: Metrics) -> None:
        left = self._pace.left(step)
        now = self._clock()
        last = step + 1 >= self._pace.total
        if self._last_line is not None and not last and now - self._last_line < LINE_EVERY_S:
            return
        self._last_line = now
        labels = dict(SHOWN)
        shown = {labels[name]: value for name, value in shown_metrics(stage, metrics).items()}
        ending = "" if last else f"; {duration(left)} left"
        self._write(f"{stage} {step + 1}/{self._pace.total}: {describe(shown)}{ending}")

    def note(self, text: str) -> None:
        self._write(text)

    def close(self) -> None:
        self._out.flush()

    def _write(self, text: str) -> None:
        self._out.write(printable(scrubbed(text), limit=NOTE_LIMIT) + "\n")
        self._out.flush()


class LiveDisplay:
    """A table redrawn in place. Output printed by others appears above it."""

    def __init__(self, title: str, console: Console, clock: Clock = time.monotonic) -> None:
        self._title = one_line(title)
        self._clock = clock
        self._pace = Pace(0, clock)
        self._stage = ""
        self._step = -1
        self._metrics: dict[str, float | int | None] = {}
        self._left: float | None = None
        self._suspended: dict[str, tuple[int, dict[str, float | int | None]]] = {}  # stages that another began within
        self._notes: list[str] = []
        self._live = Live(self.render(), console=console, refresh_per_second=4)
        self._live.start()

    def begin(self, stage: str, total: int) -> None:
        self._suspended[self._stage] = self._step, self._metrics
        self._stage, self._left = stage, None
        self._step, self._metrics = self._suspended.get(stage, (-1, {}))  # it goes on after an evaluation within it
        self._pace = Pace(total, self._clock)
        self._live.update(self.render())

    def step(self, stage: str, step: int, metrics: Metrics) -> None:
        self._stage, self._step = stage, step
        self._left = self._pace.left(step)
        self._metrics = shown_metrics(stage, metrics)
        self._live.update(self.render())

    def note(self, text: str) -> None:
        self._notes = [*self._notes, printable(scrubbed(text), limit=NOTE_LIMIT)][-NOTES_SHOWN:]
        self._live.update(self.render())

    def close(self) -> None:
        self._live.update(self.render(), refresh=True)
        self._live.stop()

    def render(self) -> RenderableType:
        """The display's present state. Only `Text`, never a string: rich reads strings as markup."""
        done = self._step + 1
        left = "" if self._left is None else f", {duration(self._left)} left"
        head = Text(f"{self._title}  {one_line(self._stage)} {done}/{self._pace.total}{left}", style="bold")
        bar = ProgressBar(total=max(1, self._pace.total), completed=done, width=60)
        table = Table.grid(padding=(0, 2))
        for name, label in SHOWN:
            if name in self._metrics:
                value = self._metrics[name]
                shown = "exactly 0" if name == "policy/ratio_max_dev" and value == 0 else number(value)
                table.add_row(Text(label), Text(shown))
        return Group(head, bar, table, *(Text(note) for note in self._notes))
