"""`keel quickstart`: a small GPT-OSS-shaped agent learns to prefer its calculator to guessing, on two CPU cores."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from keel import config_load
from keel.config import TrainConfig
from keel.monitor.summary import RunSummary

RECIPE = "quickstart.toml"


def quickstart_config(seed: int, run_dir: Path | None, sets: Sequence[str] = ()) -> TrainConfig:
    """The recipe shipped with the package, with `seed`, `run_dir` and the settings of `--set`."""
    source = files("keel.recipes").joinpath(RECIPE)
    settings = [f"seed={seed}", *([f"run_dir={str(run_dir)!r}"] if run_dir else []), *sets]
    return config_load.parse(source.read_text(encoding="utf-8"), RECIPE, settings)


def run(seed: int, run_dir: Path | None, sets: Sequence[str] = ()) -> RunSummary:
    """Build the model, warm it up, train it by reinforcement, and evaluate before, between and after."""
    from keel.loop import train

    return train(quickstart_config(seed, run_dir, sets))
