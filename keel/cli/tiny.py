"""`keel tiny-model`: a small random model and a tokenizer that knows the words of the calculator's world."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from keel.config import TrainConfig
from keel.envs.load import env_factory
from keel.models.tiny import Preset
from keel.tiny_start import build_tiny_start


def presets() -> tuple[str, ...]:
    """Names of the presets."""
    return get_args(Preset)


def write_tiny_model(preset: str, out: Path, *, seed: int) -> None:
    """Write model and tokenizer of `preset` (one of `presets()`) to `out`; the same seed writes the same bytes.

    `out` is replaced if it exists.
    """
    values = {"seed": seed, "model": {"tiny": {"preset": preset}}, "env": {"id": "CalculatorEnv"}}
    config = TrainConfig.model_validate(values)
    build_tiny_start(config, env_factory(config.env), out)
