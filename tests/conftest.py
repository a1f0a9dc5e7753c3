"""Small models and synthetic episodes for tests of what comes after the rollout."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest

from keel.types import Group, SamplingSettings, Segment, Task, TokenSpan, Trajectory, Turn

VOCAB_SIZE = 320


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
