"""`keel tiny-model`: a small random model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from keel.envs.arithmetic import CalculatorEnv
from keel.models.tiny import Preset, build_tiny_model, build_tiny_tokenizer

NUM_TEXTS = 400


def presets() -> tuple[str, ...]:
    """Names of the presets."""
    return get_args(Preset)


def write_tiny_model(preset: Preset, out: Path, *, seed: int) -> None:
    """Write model and tokenizer of `preset` to `out`; the same seed writes the same bytes."""
    style = "harmony" if preset == "gpt_oss" else "chatml"
    tokenizer = build_tiny_tokenizer(_texts(), style=style)
    build_tiny_model(preset, out, tokenizer=tokenizer, seed=seed)


def _texts() -> Iterator[str]:
    """What the quickstart's agent reads and writes: enough for a vocabulary of its words."""
    for demonstration in CalculatorEnv(num_tasks=NUM_TEXTS).demonstrations(NUM_TEXTS, seed=0, start=0):
        yield str(demonstration.task.data.get("question", ""))
        for reply in demonstration.replies:
            for message in reply:
                yield message.content
