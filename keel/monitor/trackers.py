"""Other homes for a run's numbers: TensorBoard, Weights & Biases, trackio. Extras, imported only when asked for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from keel.config import LogConfig
from keel.types import UserFault

Metrics = Mapping[str, float | int | None]


class TrackerError(UserFault, RuntimeError):
    """A tracker was asked for that is not installed."""


class Tracker(Protocol):
    """Takes a step's numbers. `step` counts training steps finished over all stages; names of
    other stages than reinforcement carry the stage's name."""

    def log(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """A run's trackers. They are an account of the run and no part of it: what one of them cannot do is told once,
    through `tell`, and the run goes on."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._trackers: list[Tracker] = []
        self._tell = tell
        self._told: set[int] = set()

    def add(self, tracker: Tracker) -> None:
        self._trackers.append(tracker)

    def log(self, step: int, metrics: Metrics) -> None:
        for tracker in self._trackers:
            self._try(tracker, functools.partial(tracker.log, step, metrics))

    def close(self) -> None:
        for tracker in self._trackers:
            self._try(tracker, tracker.close)

    def _try(self, tracker: Tracker, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 (another's code, and nothing that it does may end a run)
            if id(tracker) not in self._told:
                self._told.add(id(tracker))
                name = type(tracker).__name__.strip("_")
                self._tell(f"the tracker {name} failed, the run goes on: {type(error).__name__}: {error}")


def require(names: Sequence[str]) -> None:
    """Raise TrackerError unless every named tracker can be imported."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TrackerError(
                f"log.trackers asks for {name}, which is not installed; install it with: pip install 'keel-rl[{name}]'"
            )


def open_trackers(config: LogConfig, run_dir: Path, run_config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of `config.trackers`; they keep their own files under `run_dir`/trackers."""
    require(config.trackers)
    makers: dict[str, Callable[[LogConfig, Path, Mapping[str, Any]], Tracker]] = {
        "tensorboard": _TensorBoard,
        "wandb": _WeightsAndBiases,
        "trackio": _Trackio,
    }
    return [makers[name](config, run_dir, run_config) for name in config.trackers]


def numbers(metrics: Metrics) -> dict[str, float]:
    """The values a tracker can draw: trackers have no point for a missing or a non-finite number."""
    return {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}


class _TensorBoard:
    def __init__(self, config: LogConfig, run_dir: Path, run_config: Mapping[str, Any]) -> None:  # noqa: ARG002
        summary = importlib.import_module("tensorboard.summary")
        self._writer = summary.Writer(str(run_dir / "trackers" / "tensorboard"))

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, step=step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, config: LogConfig, run_dir: Path, run_config: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        place = run_dir / "trackers"
        place.mkdir(exist_ok=True)
        # The directory's name identifies the run, so that a resumed run goes on in the same chart.
        self._run = wandb.init(
            project=config.project,
            name=run_dir.name,
            id=run_dir.name,
            resume="allow",
            dir=str(place),
            config=dict(run_config),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log({"step": step, **numbers(metrics)})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, config: LogConfig, run_dir: Path, run_config: Mapping[str, Any]) -> None:
        trackio = importlib.import_module("trackio")
        self._run = trackio.init(project=config.project, name=run_dir.name, resume="allow", config=dict(run_config))

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(numbers(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
