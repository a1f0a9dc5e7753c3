"""The log of a run: one row a step, its status, its evaluations, its summary, its display.

A row is on disk before `log_step` returns. A checkpoint holds `state()`; after a kill, `restore` cuts off everything
later than the checkpoint, so that the repeated steps leave each row and record once.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from keel import config_load
from keel.config import TrainConfig
from keel.monitor import directory, environment, live, trackers
from keel.monitor.interrupts import Interrupts, RunInterruptedError
from keel.monitor.progress import Progress
from keel.monitor.rows import (
    RunDirectoryError,
    append_row,
    plain_numbers,
    read_json,
    read_rows,
    truncate_rows,
    write_json,
    write_text,
)
from keel.monitor.rules import Alarm
from keel.monitor.summary import RunSummary, State
from keel.monitor.watchdog import Watchdog
from keel.secrecy import refuse_secrets
from keel.types import Verdict

Metrics = Mapping[str, float | int | None]


class RunLog:
    """Writes a run directory. Use as a context manager: an exception is recorded as "failed" before it goes on.

    While it is entered, Ctrl-C and SIGTERM ask the run to stop after its step (`asked_to_stop`), and a watchdog keeps
    the heartbeat and tells of stalls. `progress` is where the run is; the loop says so.
    """

    def __init__(self, paths: directory.RunPaths, config: TrainConfig) -> None:
        """Use `RunLog.open` or `RunLog.resume`."""
        self.paths = paths
        self.config = config
        self._held = ExitStack()
        self._held.enter_context(directory.lock(paths))
        self._seconds: dict[str, float] = {}
        self._stages: list[tuple[str, int]] = []  # the innermost last
        self._booked = time.monotonic()
        self._last_step: dict[str, int] = {}
        self._num_steps: dict[str, int] = {}
        self._num_rows = 0
        self._evaluations: dict[str, dict[str, float]] = {}
        self._alarms = Counter[str]()  # by rule
        self._closed = False
        self._display = live.open_display(config.log.live, paths.root.name)
        self._trackers = trackers.Trackers(self.note)
        self._status: tuple[State, str] = ("starting", "")
        self._writing = threading.RLock()  # rows and status are the watchdog's too
        self.progress = Progress()
        self._interrupts = Interrupts(self._can_finish_step, self._answer_interrupt)
        self._watchdog = Watchdog(
            self.progress,
            paths.root / "stalls",
            stall_timeout_s=config.monitor.stall_timeout_s,
            beat=self._beat,
            note=self.note,
            alarm=self._log_stall,
        )

    @classmethod
    def open(cls, config: TrainConfig) -> Self:
        """A new run in a new directory.

        Raises RunDirectoryError if `config.run_dir` is not empty, SecretError if the config holds a secret.
        """
        trackers.require(config.log.trackers)  # before anything is written
        refuse_secrets(config.model_dump(mode="json"))
        run = cls(directory.create(config.run_dir, config.name), config)
        write_json(run.paths.environment, environment.collect_environment())
        write_text(run.paths.config, config_load.dump(config))  # last: with its config it is a run, and can be resumed
        run._set_status("starting")
        run._open_trackers()
        return run

    @classmethod
    def resume(cls, run_dir: Path) -> Self:
        """Take over an existing run; call `restore` with the checkpoint's state (or None) before logging."""
        paths = directory.reopen(run_dir)
        config = config_load.load(paths.config)
        trackers.require(config.log.trackers)
        run = cls(paths, config)
        run._num_rows = len(read_rows(paths.metrics))
        run._set_status("starting", "resuming")
        run._open_trackers()
        return run

    def note_environment(self, **facts: Any) -> list[str]:
        """Add what only torch knows (`threads`, `device`) to environment.json.

        Called again by a resumed run it compares, warns of what decides bits, keeps each resumption's facts under
        "resumed", and returns the differences.
        """
        recorded = read_json(self.paths.environment)
        now = {**environment.collect_environment(), **facts}
        if "noted" not in recorded:
            write_json(self.paths.environment, {**now, "noted": True, "resumed": []})
            return []
        changes = environment.differences(recorded, now)
        recorded["resumed"].append({**now, "changes": changes})
        write_json(self.paths.environment, recorded)
        if changes:
            text = f"resumed on another machine or setting, so the last bits may differ: {'; '.join(changes)}"
            warnings.warn(text, stacklevel=2)
            self._display.note(f"warning: {text}")
        return changes

    def _open_trackers(self) -> None:
        """Those of the config; if one cannot begin, neither does the run."""
        config = self.config
        try:
            for tracker in trackers.open_trackers(config.log, self.paths.root, config.model_dump(mode="json")):
                self._trackers.add(tracker)
        except BaseException as error:
            self.close("failed", f"{type(error).__name__}: {error}")
            raise

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[None]:
        """Time a stage ("warm_start", "reinforcement", "eval", ...) of `total` steps and show it.

        Stages may stand inside one another; seconds count for the innermost.
        """
        self._book_seconds()
        self._stages.append((name, total))
        self._show_stage()
        try:
            yield
        finally:
            self._book_seconds()
            self._stages.pop()
            self._show_stage()

    def _show_stage(self) -> None:
        if self._stages and not self._closed:
            self._display.begin(*self._stages[-1])
            self._set_status("running")

    def log_step(self, step: int, metrics: Metrics, *, stage: str = "reinforcement") -> None:
        """Append the row of `step`, which only grows within a stage. Raises RunDirectoryError for one logged before.

        Every row has a `train_step` too: training steps finished, over all stages, when it was written.
        """
        last = self._last_step.get(stage, -1)
        if step <= last:
            raise RunDirectoryError(
                f"{self.paths.metrics}: {stage} step {step} after step {last}; a row is never doubled"
            )
        self._last_step[stage] = step
        self._num_steps[stage] = self._num_steps.get(stage, 0) + 1
        self._append({"kind": "step", "stage": stage, "step": step}, metrics)
        self._set_status("running")
        self._display.step(stage, self._num_steps[stage] - 1, metrics)
        named = {f"{stage}/{name}" if stage != "reinforcement" else name: metrics[name] for name in metrics}
        self._trackers.log(self._train_step, named)

    def log_eval(self, name: str, metrics: Metrics, *, step: int) -> None:
        """Append an evaluation's row; `name` is its key in summary.json ("initial", "after_warm_start", "final").

        `step` is what the evaluation calls its step: the learner's, over all stages.
        """
        prefixed = {f"eval/{key}": value for key, value in metrics.items()}
        self._append({"kind": "eval", "name": name, "step": step}, prefixed)
        self._evaluations[name] = {"step": step, **plain_numbers(metrics)}
        self._display.note(f"eval {name}: {live.describe_evaluation(metrics)}")
        self._trackers.log(self._train_step, prefixed)

    def log_alarm(self, alarm: Alarm, *, step: int, stage: str = "reinforcement") -> None:
        """Append an alarm's row and show it; `step` is the one it was raised at, logged before."""
        head = {"kind": "alarm", "stage": stage, "step": step, **asdict(alarm)}
        self._append(head, {})
        self._alarms[alarm.rule] += 1
        self._display.note(f"alarm {alarm.rule} ({alarm.severity}) at {stage} step {step}: {alarm.text}")

    def log_worst_tokens(self, tokens: Sequence[Mapping[str, Any]], *, step: int, stage: str = "reinforcement") -> None:
        """Append the row of a step's worst tokens (JSON values), if there are any; `step` was logged before."""
        if tokens:
            self._append({"kind": "worst_tokens", "stage": stage, "step": step, "tokens": list(tokens)}, {})

    @property
    def _train_step(self) -> int:
        return sum(self._num_steps.values())

    def add_tracker(self, tracker: trackers.Tracker) -> None:
        """Have one more thing told of every step from now on, and closed after the run's last status is written."""
        self._trackers.add(tracker)

    def note(self, text: str) -> None:
        """Show a line; text of a model or a task is shown as it is, never as markup."""
        self._display.note(text)

    def asked_to_stop(self) -> Verdict:
        """ "interrupt" if the user has asked for it since the run began and there is anything left to do, else "go"."""
        planned = sum(stage.num_steps for stage in self.config.stages())
        if not self._interrupts.asked or self._train_step >= planned:
            return Verdict("go")
        return Verdict("interrupt", f"{self._interrupts.asked} after {self.progress.where()}")

    def end(self, verdict: Verdict) -> RunSummary:
        """Close the run as `verdict` says: "stopped", or, if it was the user's, raise RunInterruptedError."""
        if verdict.action == "interrupt":
            raise RunInterruptedError(self.close("interrupted", verdict.reason))
        return self.close("stopped", verdict.reason)

    def _can_finish_step(self) -> bool:
        return self.progress.under_way and not self._closed

    def _answer_interrupt(self, words: str) -> None:
        self._watchdog.say(f"{words}: finishing {self.progress.told()}; Ctrl-C again to stop now")

    def _log_stall(self, text: str) -> None:
        step = self.progress.step or 0
        stage = self.progress.stage or "starting"
        self.log_alarm(Alarm("stall", "warn", text, step), step=step, stage=stage)

    def _append(self, head: Mapping[str, Any], metrics: Metrics) -> None:
        common = {"train_step": self._train_step, "unix_s": time.time()}
        with self._writing:
            append_row(self.paths.metrics, {**head, **common, **plain_numbers(metrics)})
            self._num_rows += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the log (JSON values): what `restore` cuts back to."""
        self._book_seconds()
        return {
            "num_rows": self._num_rows,
            "seconds": dict(self._seconds),
            "last_step": dict(self._last_step),
            "num_steps": dict(self._num_steps),
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Cut rows, records and trajectories back to a checkpoint's `state()`; None: to the very beginning."""
        state = state or {"num_rows": 0, "seconds": {}, "last_step": {}, "num_steps": {}}
        truncate_rows(self.paths.metrics, state["num_rows"])
        directory.drop_records_from(self.paths, state["last_step"].get("reinforcement", -1) + 1)
        self.paths.summary.unlink(missing_ok=True)
        self._num_rows = state["num_rows"]
        self._seconds = dict(state["seconds"])
        self._last_step = dict(state["last_step"])
        self._num_steps = dict(state["num_steps"])
        self._evaluations = {}
        self._alarms.clear()
        for row in read_rows(self.paths.metrics):
            if row["kind"] == "alarm":
                self._alarms[row["rule"]] += 1
            if row["kind"] == "eval":
                metrics = {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}
                self._evaluations[row["name"]] = {"step": row["step"], **metrics}

    def close(self, state: State = "completed", reason: str = "") -> RunSummary:
        """End the run: summary.json, the last status, the display and the trackers. Later calls change nothing."""
        self._book_seconds()
        summary = RunSummary(
            run_dir=str(self.paths.root),
            state=state,
            reason=reason,
            steps=self._num_steps.get("reinforcement", 0),
            eval=dict(self._evaluations),
            alarms=dict(self._alarms),
            seconds={name: round(seconds, 3) for name, seconds in self._seconds.items()},
        )
        if self._closed:
            return summary
        self._closed = True
        with self._held:  # whatever happens here, the directory and the terminal are let go in the end
            self._held.callback(self._display.close)
            with self._interrupts.held_off():
                self._watchdog.stop()
                write_json(self.paths.summary, asdict(summary))
                self._set_status(state, reason)
            if state == "interrupted" or (state == "failed" and any(self.paths.checkpoints.iterdir())):
                self.note(f"{state}: {reason}; to go on: keel resume {self.paths.root}")
            self._trackers.close()
        return summary

    def __enter__(self) -> Self:
        self._interrupts.__enter__()
        self._watchdog.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
            elif issubclass(kind, KeyboardInterrupt):
                self.close("interrupted", str(error) or "interrupted from the keyboard")
            else:
                self.close("failed", f"{kind.__name__}: {error}")
        finally:
            self._interrupts.__exit__()

    def _book_seconds(self) -> None:
        now = time.monotonic()
        if self._stages:
            name = self._stages[-1][0]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._booked
        self._booked = now

    def _beat(self) -> None:
        with self._writing:
            self._set_status(*self._status)

    def _set_status(self, state: State, reason: str = "") -> None:
        value = {
            "state": state,
            "reason": reason,
            "stage": self._stages[-1][0] if self._stages else "",
            "steps_done": dict(self._num_steps),
            "steps": self.config.steps,
            "heartbeat_unix_s": time.time(),
            "progress_unix_s": self._watchdog.moved_unix_s,
            "pid": os.getpid(),
        }
        with self._writing:
            self._status = (state, reason)
            write_json(self.paths.status, value)
