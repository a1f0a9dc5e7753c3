"""Small models and synthetic episodes for tests of what comes after the rollout."""

from __future__ import annotations

import dataclasses
import fcntl
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from keel.types import Group, SamplingSettings, Segment, Task, TokenSpan, Trajectory, Turn

VOCAB_SIZE = 320

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("keel", deadline=None)
settings.load_profile("keel")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`tiny_checkpoint(preset, **overrides)`: path of a small model without tokenizer, made once per session."""
    made: dict[str, str] = {}

    def build(preset: str = "gpt_oss", **overrides: object) -> str:
        from keel.models.tiny import build_tiny_model

        key = f"{preset} {sorted(overrides.items())}"
        if key not in made:
            path = tmp_path_factory.mktemp(preset)
            build_tiny_model(preset, path, vocab_size=VOCAB_SIZE, seed=1, **overrides)
            made[key] = str(path)
        return made[key]

    return build


@pytest.fixture(scope="session")
def make_groups() -> Callable[..., list[Group]]:
    return synthetic_groups


def synthetic_groups(
    num_groups: int = 4,
    group_size: int = 4,
    *,
    seed: int = 0,
    shortest: int = 12,
    longest: int = 40,
    version: int = 0,
    demonstration: bool = False,
) -> list[Group]:
    """Episodes of two turns with ragged lengths and made-up tokens, log-probs and rewards; the same for a seed."""
    draw = random.Random(seed)
    groups = []
    for group in range(num_groups):
        task = Task(f"task {group}")
        attempts = []
        for attempt in range(group_size):
            sizes = [draw.randint(shortest // 4, longest // 4) for _ in range(4)]
            spans = tuple(
                _span(draw, size, ("context", "demonstration" if demonstration else "policy")[index % 2], version)
                for index, size in enumerate(sizes)
            )
            turns = tuple(Turn((), "", "stop", 0, span) for span in (1, 3))
            trajectory = Trajectory(task, f"group {group}", attempt, (), turns, (Segment(spans),), "completed")
            attempts.append(dataclasses.replace(trajectory, reward=float(draw.random() < 0.5)))
        groups.append(Group(f"group {group}", task, tuple(attempts)))
    return groups


def _span(draw: random.Random, size: int, origin: str, version: int) -> TokenSpan:
    token_ids = tuple(draw.randrange(VOCAB_SIZE) for _ in range(size))
    if origin != "policy":
        return TokenSpan(token_ids, origin)
    logprobs = tuple(-5 * draw.random() for _ in token_ids)
    return TokenSpan(token_ids, origin, logprobs, version, SamplingSettings(temperature=0.8))


def small_config(preset: str, run_dir: Path, **sections: Any) -> dict[str, Any]:
    """What a run of seconds takes: sums of one-digit numbers, two layers, few episodes; `sections` go over it."""
    config: dict[str, Any] = {
        "run_dir": str(run_dir),
        "log": {"live": "off"},
        "model": {"tiny": {"preset": preset, "vocab_size": 500, "options": {"num_hidden_layers": 2}}},
        "env": {
            "id": "CalculatorEnv",
            "options": {
                "tasks_of": ["chain_sum"],
                "num_tasks": 300,
                "max_terms": 2,
                "max_digits": 1,
                "guess_share": 0.2,
            },
        },
        "rollout": {
            "groups_per_step": 2,
            "group_size": 8,
            "max_turns": 3,
            "max_new_tokens": 40,
            "max_sequence_tokens": 192,
        },
        "engine": {"slots": 16, "prefill_tile": 64},
        "batch": {"max_tokens": 512},
        "warm_start": {"demonstrations_per_step": 16, "optim": {"lr": 4e-3}},
        "checkpoint": {"every": 0, "keep": 1},
    }
    if preset == "qwen3_moe":
        config["model"]["tiny"]["options"]["mlp_only_layers"] = []
    for name, section in sections.items():
        config[name] = {**config[name], **section} if isinstance(section, dict) and name in config else section
    return config


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Any]:
    """`make_config(run_dir, preset, **sections)`: a TrainConfig; `model={"path": ...}` stands in for the preset."""

    def make(run_dir: Path, preset: str = "gpt_oss", **sections: Any) -> Any:
        from keel.config import TrainConfig

        config = small_config(preset, run_dir, **sections)
        if "path" in config["model"]:
            del config["model"]["tiny"]
        return TrainConfig(**config)

    return make


@pytest.fixture(scope="session")
def warm_run(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., Any]) -> Callable[[str], Path]:
    """`warm_run(preset)`: the directory of a run whose agent calls its calculator; `checkpoints/*/weights` in it.

    Made once, for all worker processes.
    """
    root = tmp_path_factory.getbasetemp()
    if root.name.startswith("popen-"):  # a worker's own directory; its parent is everybody's
        root = root.parent

    def build(preset: str = "gpt_oss") -> Path:
        run_dir = root / f"warm-{preset}"
        with (root / f"warm-{preset}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (run_dir / "summary.json").exists():
                from keel.loop import train

                train(make_config(run_dir, preset, steps=2, warm_start={"steps": 40}, eval={"num_tasks": 24}))
        return run_dir

    return build


@pytest.fixture(scope="session")
def warm_weights(warm_run: Callable[[str], Path]) -> Callable[..., str]:
    """`warm_weights(preset)`: the Hugging Face directory that `warm_run` ends with."""

    def find(preset: str = "gpt_oss") -> str:
        (weights,) = (warm_run(preset) / "checkpoints").glob("*/weights")
        return str(weights)

    return find
