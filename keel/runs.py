"""A run directory, read: rows, records, trajectories, checkpoints, of a run that goes on, has ended, or crashed.

Reading trusts nothing. No code is imported (the plug-ins that config.toml names are not resolved) and nothing is
unpickled: the formats are TOML, JSON and safetensors. A file that is missing, torn or damaged costs what was in it and
is told of in `Run.problems`; the rest is read.

    run = load_run("runs/20260101-120000-run")
    run.rows[-1]["reward/mean"]
    record = run.step(137)
    record.sequences[0].token_ids
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from keel import config_load
from keel.config import TrainConfig
from keel.config_problems import ConfigError
from keel.monitor import cells, directory
from keel.monitor.live import success_share
from keel.monitor.rows import SCHEMA_VERSION, RunDirectoryError
from keel.rollouts.store import RecordError, read_trajectories
from keel.step_record import SequenceView, StepRecord, load_record
from keel.types import Trajectory

__all__ = ["Run", "SequenceView", "StepRecord", "load_record", "load_run"]

T = TypeVar("T")
_NOT_ENDED = ("starting", "running")
_IN_SHORT = ("reward/mean", "success", "mismatch/abs_mean", "policy/entropy", "policy/grad_norm")


@dataclass(frozen=True)
class Run:
    """A run directory as it is now; load it again to see what has been written since. Use `load_run`."""

    path: Path
    problems: list[str] = field(default_factory=list, compare=False)
    """What could not be read so far, in words; it grows as properties are asked for."""

    @property
    def paths(self) -> directory.RunPaths:
        return directory.RunPaths(self.path)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def config_text(self) -> str:
        """config.toml as it stands. Raises RunDirectoryError if it cannot be read."""
        try:
            return self.paths.config.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunDirectoryError(f"{self.paths.config}: cannot be read: {error}") from error

    @cached_property
    def config(self) -> TrainConfig:
        """The resolved config; the plug-ins it names are not looked at.

        Raises RunDirectoryError if config.toml is broken or of a Keel with other options.
        """
        try:
            return config_load.parse(self.config_text, str(self.paths.config), resolve_plugins=False)
        except (ConfigError, RecursionError) as error:
            raise RunDirectoryError(f"{error}\n    fix: read this run with the Keel that wrote it") from error

    @cached_property
    def status(self) -> dict[str, Any]:
        """status.json; empty if there is none."""
        return self._json(self.paths.status)

    @cached_property
    def summary(self) -> dict[str, Any] | None:
        """summary.json, or None: the run goes on, or ended without closing."""
        return self._json(self.paths.summary) or None

    @cached_property
    def environment(self) -> dict[str, Any]:
        """environment.json; empty if there is none."""
        return self._json(self.paths.environment)

    @cached_property
    def is_running(self) -> bool:
        """Does a process on this machine hold the directory?"""
        return _is_held(self.path / ".lock")

    @property
    def state(self) -> str:
        """The status's state; "crashed" for one that says it runs while no process holds the directory."""
        state = str(self.status.get("state", "")) or "unknown"
        return "crashed" if state in _NOT_ENDED and not self.is_running else state

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """All complete rows of metrics.jsonl in order; a torn last row is left out, a damaged one is a problem."""
        if not self.paths.metrics.is_file():
            return []
        *lines, _torn = self._read(self.paths.metrics, Path.read_bytes, b"").split(b"\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                self.problems.append(f"{self.paths.metrics}:{number}: not a JSON row: {error}")
                continue
            if isinstance(row, dict) and row.get("schema_version") == SCHEMA_VERSION:
                rows.append(row)
            else:
                self.problems.append(f"{self.paths.metrics}:{number}: not a row of schema version {SCHEMA_VERSION}")
        return rows

    def rows_of(self, kind: str) -> list[dict[str, Any]]:
        """The rows of a kind: "step", "eval" or "alarm"."""
        return [row for row in self.rows if row.get("kind") == kind]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Evaluations in order: `name`, `train_step`, `step`, `unix_s`, and metrics without their "eval/"."""
        names = ("name", "train_step", "step", "unix_s")
        return [
            {key: row.get(key) for key in names}
            | {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}
            for row in self.rows_of("eval")
        ]

    @cached_property
    def recorded_evaluations(self) -> list[dict[str, Any]]:
        """What `keel eval --record` put into RUN/evaluations, by file name: `name`, `checkpoint`, `model`, `env`,
        `unix_s`, `attempts`, and metrics as in `evaluations`. The run's own evaluations are not among them."""
        found = [self._json(item) for item in self._items(self.path / "evaluations") if item.suffix == ".json"]
        return [_flat(value) for value in found if value]

    @property
    def alarms(self) -> list[dict[str, Any]]:
        """Alarm rows in order: `rule`, `severity`, `text`, `stage`, `step`, `train_step`, `first_step`."""
        return self.rows_of("alarm")

    @cached_property
    def steps(self) -> list[int]:
        """Numbers of the reinforcement steps with a step record or trajectories, sorted."""
        found = {
            int(item.name.partition(".")[0])
            for folder, suffix in ((self.paths.steps, ".safetensors"), (self.paths.trajectories, ".jsonl"))
            for item in self._items(folder)
            if item.suffix == suffix and _is_number(item.name.partition(".")[0])
        }
        return sorted(found)

    def step(self, number: int) -> StepRecord:
        """The token streams of a step. Raises RunDirectoryError if it has no (readable) record."""
        return load_record(self._existing(self.paths.steps / f"{number:06d}.safetensors", number))

    def trajectories(self, number: int) -> list[Trajectory]:
        """The readable half of a step, failed attempts included; segments are empty, `step(number)` has the tokens.

        Raises RunDirectoryError if the file is missing or broken.
        """
        path = self._existing(self.paths.trajectories / f"{number:06d}.jsonl", number)
        try:
            trajectories = read_trajectories(path)
        except (RecordError, OSError, RecursionError) as error:
            raise RunDirectoryError(f"{path}: cannot be read: {error}") from error
        for line, trajectory in enumerate(trajectories, start=1):
            if not _is_sound(trajectory):
                raise RunDirectoryError(f"{path}, line {line}: not a trajectory: a value is of another type")
        return trajectories

    @property
    def checkpoints(self) -> list[Path]:
        """Complete checkpoint directories, newest last; unfinished ones are left out."""
        found = [
            item
            for item in self._items(self.paths.checkpoints)
            if _is_number(item.name) and (item / "manifest.json").is_file()
        ]
        return sorted(found, key=lambda item: int(item.name))

    def weights(self, checkpoint: int | str | Path | None = None) -> Path:
        """The Hugging Face directory of a checkpoint: training steps done, a name, a path; None is the newest.

        Raises RunDirectoryError if there is none such.
        """
        known = self.checkpoints
        if checkpoint is None:
            if not known:
                raise RunDirectoryError(
                    f"{self.path} has no checkpoint yet; wait for one (checkpoint.every), or let the run end"
                )
            return known[-1] / "weights"
        name = f"{checkpoint:06d}" if isinstance(checkpoint, int) else Path(checkpoint).name
        for path in known:
            if path.name == name:
                return path / "weights"
        names = ", ".join(path.name for path in known) or "none"
        raise RunDirectoryError(f"{self.path} has no checkpoint {name}; there are: {names}")

    def _repr_html_(self) -> str:
        steps = self.rows_of("step")
        last = steps[-1] if steps else {}
        named: dict[str, object] = {"state": self.state, "reason": self.status.get("reason") or None}
        named |= {
            "directory": self.path,
            "training steps": last.get("train_step", 0),
            "recorded steps": len(self.steps),
        }
        named |= {f"last {name}": last[name] for name in _IN_SHORT if name in last}
        named |= {f"success, {each['name']}": success_share(each) for each in self.evaluations}
        if self.alarms:
            named["alarms"] = len(self.alarms)
        if self.problems:
            named["not readable"] = "; ".join(self.problems)
        return cells.facts(f"run {self.name}", named)

    def _json(self, path: Path) -> dict[str, Any]:
        if not path.is_file():
            return {}
        text = self._read(path, lambda file: file.read_text(encoding="utf-8"), "")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.problems.append(f"{path}: not JSON: {error}")
            return {}
        if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
            self.problems.append(f"{path}: not of schema version {SCHEMA_VERSION}")
            return {}
        return value

    def _read(self, path: Path, read: Callable[[Path], T], instead: T) -> T:
        try:
            return read(path)
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(f"{path}: cannot be read: {error}")
            return instead

    def _items(self, folder: Path) -> list[Path]:
        return self._read(folder, lambda directory: sorted(directory.iterdir()), []) if folder.is_dir() else []

    def _existing(self, path: Path, number: int) -> Path:
        if path.is_file():
            return path
        known = self.steps
        there = f"{len(known)} steps from {known[0]} to {known[-1]}" if known else "none"
        raise RunDirectoryError(
            f"{path}: step {number} was not recorded or not kept; recorded: {there} (record.every, record.keep)"
        )


def load_run(path: str | Path) -> Run:
    """The run in the directory `path`, whatever its state.

    Raises RunDirectoryError if it is none, that is, has no config.toml.
    """
    root = Path(path)
    if not root.is_dir():
        raise RunDirectoryError(f"{root} is not a directory; give the directory of a run, as `keel train` printed it")
    directory.reopen(root)
    return Run(root)


def _is_sound(trajectory: Trajectory) -> bool:
    """Whether texts are texts and numbers numbers, in what a JSON file said."""
    turns = trajectory.turns
    messages = [*trajectory.prompt, *(message for turn in turns for message in (*turn.reply, *turn.observation))]
    texts = [trajectory.task.id, trajectory.group_id, trajectory.status]
    texts += [text for turn in turns for text in (turn.reply_text, turn.finish_reason)]
    texts += [text for message in messages for text in (message.role, message.content)]
    maybe = [trajectory.error, *(turn.malformed for turn in turns)]
    maybe += [text for message in messages for text in (message.channel, message.recipient, message.name)]
    numbers = [trajectory.reward, trajectory.attempt, *trajectory.metrics.values(), *trajectory.reward_parts.values()]
    return (
        all(isinstance(text, str) for text in texts)
        and all(text is None or isinstance(text, str) for text in maybe)
        and all(isinstance(value, (int, float)) for value in numbers)
        and isinstance(trajectory.task.data, Mapping)
    )


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded evaluation in the shape of a row: an estimate becomes `name`, `name_low` and `name_high`."""
    passed = value.get("pass_at_k")
    estimates = {name: value.get(name) for name in ("reward", "success")}
    estimates |= {f"pass@{k}": each for k, each in passed.items()} if isinstance(passed, dict) else {}
    row = {key: item for key, item in value.items() if isinstance(item, (str, int, float))}
    for name, estimate in estimates.items():
        if isinstance(estimate, dict) and estimate.get("value") is not None:
            row[name] = estimate["value"]
            row |= {f"{name}_{end}": estimate[end] for end in ("low", "high") if estimate.get(end) is not None}
    return row


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _is_held(lock: Path) -> bool:
    """Whether another holds the lock: tried with a shared one, let go at once; nothing is created."""
    if not lock.is_file():
        return False
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
