"""A run directory: its names (a contract, docs/loop.md), its creation, and the lock that keeps two runs out of it."""

from __future__ import annotations

import datetime as dt
import errno
import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from keel.monitor.rows import RunDirectoryError

MAX_SAME_NAME = 1000
# What a run that was killed before its config was written may have left; config.toml makes a directory a run.
_BEFORE_CONFIG = (".lock", "environment.json", ".environment.json.tmp", ".config.toml.tmp")


@dataclass(frozen=True, slots=True)
class RunPaths:
    """Where things lie in a run directory."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def status(self) -> Path:
        return self.root / "status.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def steps(self) -> Path:
        return self.root / "steps"

    @property
    def trajectories(self) -> Path:
        return self.root / "trajectories"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def checkpoint(self, name: str) -> Path:
        """Directory of a checkpoint: "000050" for a step, or a stage's name."""
        return self.checkpoints / name


def create(run_dir: str, name: str) -> RunPaths:
    """Make a new run directory: `run_dir`, or, if that is empty, runs/<date>-<name> with a number if it is taken.

    Raises RunDirectoryError if `run_dir` exists and holds anything: a run never overwrites another. What a run left
    that was killed before its config was written is no run yet. Also raises RunDirectoryError if it cannot be made.
    """
    try:
        paths = RunPaths(_fresh(name) if not run_dir else Path(run_dir))
        _require_nothing(paths)
        for directory in (paths.root, paths.steps, paths.trajectories, paths.checkpoints):
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # there is nothing to choose, but something to delete
        raise RunDirectoryError(
            f"run directory {run_dir or 'runs'} cannot be made: {error}; choose another with --set run_dir=..."
        ) from error
    return paths


def _require_nothing(paths: RunPaths) -> None:
    root = paths.root
    if not root.exists() or (root.is_dir() and _nothing_yet(root)):
        return
    another = "choose another with --set run_dir=..."
    if not root.is_dir():
        raise RunDirectoryError(f"run directory {root} is a file; {another}")
    if not paths.config.is_file():
        raise RunDirectoryError(f"run directory {root} is not empty, and holds no run; {another}")
    raise RunDirectoryError(
        f"run directory {root} is not empty, and a run never overwrites another; {another}, "
        f"or continue it with: keel resume {root}"
    )


def _nothing_yet(root: Path) -> bool:
    items = [item for item in root.iterdir() if item.name not in _BEFORE_CONFIG]
    rooms = ("steps", "trajectories", "checkpoints")
    return all(item.name in rooms and item.is_dir() and not any(item.iterdir()) for item in items)


def _fresh(name: str) -> Path:
    date = dt.datetime.now(tz=dt.UTC).astimezone().strftime("%Y%m%d-%H%M%S")
    Path("runs").mkdir(exist_ok=True)
    for number in range(1, MAX_SAME_NAME):
        path = Path("runs") / (f"{date}-{name}" if number == 1 else f"{date}-{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise RunDirectoryError(f"runs/{date}-{name} and {MAX_SAME_NAME} numbered ones exist; give run_dir")


def reopen(run_dir: Path) -> RunPaths:
    """An existing run directory, for resuming. Raises RunDirectoryError if it is none."""
    paths = RunPaths(run_dir)
    if not paths.config.is_file():
        raise RunDirectoryError(f"{run_dir} is not a run directory: it has no config.toml")
    return paths


def lock(paths: RunPaths) -> IO[str]:
    """Hold the directory for this process; the operating system lets go when the process ends, however it ends.

    Raises RunDirectoryError if another process holds it.
    """
    file = (paths.root / ".lock").open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise RunDirectoryError(f"{paths.root} is in use by a running process; wait for it or end it first") from error
    return file


def drop_records_from(paths: RunPaths, step: int) -> list[Path]:
    """Delete step records and trajectories of `step` and later, and half-written ones; returns what was deleted."""
    dropped = []
    for directory in (paths.steps, paths.trajectories):
        for path in sorted(directory.iterdir()) if directory.is_dir() else ():
            stem = path.name.lstrip(".").partition(".")[0]
            half_written = path.name.startswith(".") or path.name.endswith(".tmp")
            if half_written or (stem.isdecimal() and int(stem) >= step):
                path.unlink()
                dropped.append(path)
    return dropped
