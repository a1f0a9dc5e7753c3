"""An engine over a policy with an adapter: a request's bits are its own; what it samples from is what is trained."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from keel.batch import pack
from keel.config import EngineConfig, LoraConfig
from keel.engines.embedded import EmbeddedEngine
from keel.models.policy import PolicyModel
from keel.types import Group, Segment, Task, TokenSpan, Trajectory

KINDS = [("gpt_oss", "float32", 8), ("gpt_oss", "bfloat16", 1), ("qwen3_moe", "float32", 3), ("qwen3", "bfloat16", 16)]


@pytest.fixture
def adapted(tiny_checkpoint: Callable[..., str]) -> Callable[..., PolicyModel]:
    odd = {"gpt_oss": "intermediate_size", "qwen3_moe": "moe_intermediate_size", "qwen3": "intermediate_size"}

    def load(preset: str, dtype: str, rank: int) -> PolicyModel:
        path = tiny_checkpoint(preset, num_hidden_layers=3, **{odd[preset]: 75})
        policy = PolicyModel.load(path, dtype=dtype, lora=LoraConfig(rank=rank))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.trained_parameters().values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return policy

    return load


@pytest.mark.parametrize(("preset", "dtype", "rank"), KINDS)
def test_neighbours_order_slots_and_slow_tools_change_nothing(
    adapted: Any, random_episode: Any, run_episodes: Any, preset: str, dtype: str, rank: int
) -> None:
    policy = adapted(preset, dtype, rank)

    def engine() -> EmbeddedEngine:
        return EmbeddedEngine(policy, EngineConfig(slots=7, prefill_tile=32), max_sequence_tokens=88)

    everybody = [random_episode(number, policy.info.vocab_size, prompt_of=100 + number // 3) for number in range(13)]
    together = run_episodes(engine(), everybody)
    slow = [dataclasses.replace(episode, loop_turns=i % 5 * 7) for i, episode in enumerate(everybody)]
    assert run_episodes(engine(), slow[::-1]) == together
    for episode in everybody[2:13:5]:
        assert run_episodes(engine(), [episode])[episode.name] == together[episode.name]
    with policy.without_adapter():
        assert run_episodes(engine(), everybody[:3]) != {name: together[name] for name in list(together)[:3]}


@pytest.mark.parametrize(("preset", "dtype", "rank"), KINDS)
def test_engine_and_learner_differ_by_rounding_alone(adapted: Any, preset: str, dtype: str, rank: int) -> None:
    policy = adapted(preset, dtype, rank)
    engine = EmbeddedEngine(policy, EngineConfig(slots=7, prefill_tile=32), max_sequence_tokens=88)
    tokens = tuple((7 * index) % policy.info.vocab_size for index in range(60))
    scored = asyncio.run(engine.score(tokens)).logprobs
    segment = Segment((TokenSpan(tokens[:1], "context"), TokenSpan(tokens[1:], "demonstration")))
    trajectory = Trajectory(Task("t"), "g", 0, (), (), (segment,), "completed")
    with torch.no_grad():
        learned = policy(pack([Group("g", Task("t"), (trajectory,))], max_tokens=100).micro_batches[0]).logprobs
    gap = (torch.tensor(scored) - learned).abs().max()
    assert gap < (2e-5 if dtype == "float32" else 0.2)
    with policy.without_adapter(), torch.no_grad():
        base = torch.tensor(asyncio.run(engine.score(tokens)).logprobs)
    assert (base - learned).abs().max() > 10 * gap
