"""An engine over a small model of odd sizes, and episodes to run on it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from keel.config import EngineConfig
from keel.engines.base import GenerateRequest, GenerateResult
from keel.engines.embedded import EmbeddedEngine
from keel.models.policy import PolicyModel
from keel.types import SamplingSettings

CAPACITY = 88


@dataclass(frozen=True)
class Episode:
    """Turns of an episode: what is put before each reply, and how long the reply may be."""

    name: str
    contexts: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    seed: int
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    stop_token_ids: tuple[int, ...] = ()
    loop_turns: int = 0  # how many turns of the event loop a "tool" takes

    async def run(self, engine: EmbeddedEngine) -> list[GenerateResult]:
        tokens: tuple[int, ...] = ()
        results = []
        for number, (context, length) in enumerate(zip(self.contexts, self.lengths, strict=True)):
            tokens += context
            request = GenerateRequest(
                f"{self.name}/{number}",
                self.name,
                tokens,
                self.sampling,
                length,
                self.stop_token_ids,
                self.seed,
                return_routes=True,
            )
            results.append(await engine.generate(request))
            tokens += results[-1].token_ids
            for _ in range(self.loop_turns):
                await asyncio.sleep(0)
        await engine.end_session(self.name)
        return results


def _random_episode(
    number: int, vocab_size: int, *, prompt_of: int | None = None, loop_turns: int = 0, turns: int = 2
) -> Episode:
    """Episode `number`; `prompt_of` makes its first context that of another number (a group shares one)."""
    draw = random.Random(number)
    first = random.Random(number if prompt_of is None else prompt_of)
    contexts = [tuple(first.randrange(vocab_size) for _ in range(first.randint(1, 30)))]
    contexts += [tuple(draw.randrange(vocab_size) for _ in range(draw.randint(1, 12))) for _ in range(turns - 1)]
    settings = [
        SamplingSettings(),
        SamplingSettings(0.7, 0.9, 20),
        SamplingSettings(1.3, 1.0, 5),
        SamplingSettings(0.0),
    ]
    return Episode(
        f"episode {number}",
        tuple(contexts),
        tuple(draw.randint(1, 14) for _ in range(turns)),
        seed=1000 + number,
        sampling=settings[number % 4],
        loop_turns=loop_turns,
    )


def _run_episodes(engine: EmbeddedEngine, episodes: Sequence[Episode]) -> dict[str, list[GenerateResult]]:
    """All at once, on an event loop of their own."""

    async def main() -> list[list[GenerateResult]]:
        return list(await asyncio.gather(*(episode.run(engine) for episode in episodes)))

    return {episode.name: results for episode, results in zip(episodes, asyncio.run(main()), strict=True)}


@pytest.fixture
def random_episode() -> Callable[..., Episode]:
    return _random_episode


@pytest.fixture
def run_episodes() -> Callable[..., dict[str, list[GenerateResult]]]:
    return _run_episodes


@pytest.fixture(scope="session")
def make_engine(tiny_checkpoint: Callable[..., str]) -> Callable[..., EmbeddedEngine]:
    """`make_engine(preset, dtype, slots=..., prefill_tile=..., capacity=...)`, a fresh engine over a loaded model."""
    loaded: dict[tuple[str, str], PolicyModel] = {}
    odd = {"gpt_oss": "intermediate_size", "qwen3_moe": "moe_intermediate_size", "qwen3": "intermediate_size"}

    def build(
        preset: str = "gpt_oss",
        dtype: str = "float32",
        *,
        slots: int = 5,
        prefill_tile: int = 32,
        capacity: int = CAPACITY,
        fresh: bool = False,
        return_routes: bool = True,
        **options: object,
    ) -> EmbeddedEngine:
        # An inner width that is no multiple of a vector register shows whether a row's place in a pass matters.
        path = tiny_checkpoint(preset, num_hidden_layers=3, **{odd[preset]: 75})
        if fresh or (preset, dtype) not in loaded:
            policy = PolicyModel.load(path, dtype=dtype)
            if fresh:
                loaded.pop((preset, dtype), None)
            else:
                loaded[preset, dtype] = policy
        else:
            policy = loaded[preset, dtype]
        config = EngineConfig(slots=slots, prefill_tile=prefill_tile, return_routes=return_routes)
        return EmbeddedEngine(policy, config, max_sequence_tokens=capacity, **options)

    return build
