"""Layers with a sliding window keep the window; what is written over is never taken for what it was."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from keel.engines.base import EngineError
from keel.engines.embedded import EmbeddedEngine
from keel.engines.embedded.cache import layer_columns

Make = Callable[..., EmbeddedEngine]
WINDOW, CAPACITY = 32, 300  # of the tiny GPT-OSS; a pass of 32 rows, or of 64, leaves a ring of 128 columns at most


def long_episode(random_episode: Any, number: int, vocab_size: int, *, prompt: int = 150) -> Any:
    episode = random_episode(number, vocab_size, turns=3)
    first = tuple((7 * i + 3) % vocab_size for i in range(prompt))
    return dataclasses.replace(episode, contexts=(first, *episode.contexts[1:]), lengths=(25, 1, 30))


def test_a_layer_keeps_its_window_beside_a_pass_and_no_more_than_there_are_positions() -> None:
    assert layer_columns(1000, None, 64) == 1024
    assert layer_columns(1000, 128, 64) == 192
    assert layer_columns(100, 128, 64) == 128


def test_windowed_layers_take_less_memory_and_say_what_a_plain_forward_pass_says(
    make_engine: Make, random_episode: Any, run_episodes: Any
) -> None:
    engine = make_engine(capacity=CAPACITY, slots=3)
    sizes = [keys.shape[2] for keys in engine._cache.keys]
    assert sizes == [128, 320, 128]  # sliding, full, sliding
    assert engine.capabilities().cache_bytes == sum(t.nbytes for t in (*engine._cache.keys, *engine._cache.values))
    episode = long_episode(random_episode, 4, engine.policy.info.vocab_size)
    results = run_episodes(engine, [episode])[episode.name]
    path = engine.policy.model.config._name_or_path
    model = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    tokens: list[int] = []
    for context, result in zip(episode.contexts, results, strict=True):
        start = len(tokens) + len(context)
        tokens += [*context, *result.token_ids]
        with torch.no_grad():
            expected = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)
        drawn = torch.tensor(result.token_ids)
        places = torch.arange(start, len(tokens)) - 1
        found = torch.tensor(result.spans[0].logprobs, dtype=torch.float64)
        assert episode.sampling.temperature == 1.0
        assert (found - expected[places, drawn]).abs().max() < 1e-5
    scored = asyncio.run(engine.score(tuple(tokens)))
    assert (torch.tensor(scored.logprobs)[places] - expected[places, drawn]).abs().max() < 1e-5


@pytest.mark.parametrize("prompt", [150, 37])
def test_rings_change_nothing_for_anybody(
    make_engine: Make, random_episode: Any, run_episodes: Any, prompt: int
) -> None:
    """More sessions than slots, a common prompt, and sources that have gone far beyond it when others want a copy."""
    engine = make_engine(capacity=CAPACITY, slots=4)
    vocab_size = engine.policy.info.vocab_size
    everybody = [
        dataclasses.replace(
            long_episode(random_episode, 4 * number, vocab_size, prompt=prompt), loop_turns=number % 3 * 6
        )
        for number in range(7)
    ]
    together = run_episodes(engine, everybody)
    assert engine.statistics()["shared_tokens"] > 0
    assert engine.statistics()["remade_tokens"] > 0
    for episode in everybody[::3]:
        alone = make_engine(capacity=CAPACITY, slots=4)
        assert run_episodes(alone, [episode])[episode.name] == together[episode.name]


def test_a_window_that_the_cache_was_not_made_for_is_refused(make_engine: Make, random_episode: Any) -> None:
    engine = make_engine(capacity=CAPACITY, fresh=True)
    engine.policy.model.model.layers[0].self_attn.sliding_window = None
    episode = long_episode(random_episode, 4, engine.policy.info.vocab_size)
    with pytest.raises(EngineError, match="layer 0 attends with window None"):
        asyncio.run(episode.run(engine))
