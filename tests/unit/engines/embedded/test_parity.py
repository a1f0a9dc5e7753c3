"""What the engine says it drew, and from which experts, against `transformers`' own eager forward pass."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from keel.engines.base import GenerateRequest
from keel.engines.embedded import EmbeddedEngine
from keel.types import Routes, SamplingSettings

Make = Callable[..., EmbeddedEngine]


def eager(engine: EmbeddedEngine) -> Any:
    path = engine.policy.model.config._name_or_path
    experts = {"experts_implementation": "eager"} if engine.policy.info.num_experts else {}
    return AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32, **experts
    ).eval()


def unpack(routes: Routes) -> np.ndarray:
    return np.frombuffer(routes.data, dtype=np.uint16).reshape(routes.shape)


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_routes_are_those_of_a_plain_forward_pass(
    make_engine: Make, random_episode: Any, run_episodes: Any, preset: str, temperature: float
) -> None:
    engine = make_engine(preset, slots=3)
    vocab_size = engine.policy.info.vocab_size
    model = eager(engine)
    for number in (0, 4, 8):
        episode = random_episode(number, vocab_size, turns=3)
        episode = dataclasses.replace(episode, sampling=SamplingSettings(temperature))
        tokens: list[int] = []
        drawn: dict[int, float] = {}
        routes = []
        for context, result in zip(episode.contexts, run_episodes(engine, [episode])[episode.name], strict=True):
            tokens += context
            for token, logprob in zip(result.token_ids, result.spans[0].logprobs, strict=True):
                drawn[len(tokens)] = logprob
                tokens.append(token)
            if result.routed_experts is not None:
                assert result.routes_start == result.num_cached_tokens == sum(len(part) for part in routes)
                routes.append(unpack(result.routed_experts))
        with torch.no_grad():
            options = {} if preset == "qwen3" else {"output_router_logits": True}
            output = model(torch.tensor([tokens]), **options)
        expected = torch.log_softmax(output.logits[0].double() / temperature, dim=-1)
        places = list(drawn)
        wanted = expected[[p - 1 for p in places], [tokens[p] for p in places]]
        assert torch.allclose(torch.tensor(list(drawn.values()), dtype=torch.float64), wanted, rtol=0, atol=1e-5)
        if preset != "qwen3":
            top = [layer.topk(engine.policy.info.top_k, dim=-1).indices for layer in output.router_logits]
            chosen = torch.stack(top, dim=1).numpy()[: len(tokens) - 1]
            assert np.array_equal(np.sort(np.concatenate(routes), axis=-1), np.sort(chosen, axis=-1))
        else:
            assert routes == []


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3_moe"])
def test_score_is_the_log_softmax_of_a_plain_forward_pass(make_engine: Make, preset: str) -> None:
    engine = make_engine(preset)
    draw = np.random.default_rng(0)
    tokens = tuple(draw.integers(0, engine.policy.info.vocab_size, 70).tolist())  # more than two tiles of 32 rows

    async def main() -> Any:
        return await asyncio.gather(*(engine.score(tokens[:length]) for length in (70, 1, 2, 33)))

    results = asyncio.run(main())
    with torch.no_grad():
        output = eager(engine)(torch.tensor([tokens]), output_router_logits=True)
    expected = torch.log_softmax(output.logits[0].double(), dim=-1)[range(69), tokens[1:]]
    for result, length in zip(results, (70, 1, 2, 33), strict=True):
        assert len(result.logprobs) == length - 1
        got = torch.tensor(result.logprobs, dtype=torch.float64)
        assert torch.allclose(got, expected[: length - 1], rtol=0, atol=1e-5)
        chosen = torch.stack([layer.topk(engine.policy.info.top_k).indices for layer in output.router_logits], dim=1)
        assert result.routed_experts is not None
        assert np.array_equal(np.sort(unpack(result.routed_experts)), np.sort(chosen.numpy()[:length]))


def test_greedy_is_what_transformers_generates(make_engine: Make) -> None:
    engine = make_engine("gpt_oss")
    prompt = tuple(range(40, 60))
    request = GenerateRequest("r", "", prompt, SamplingSettings(temperature=0.0), 40, (), 0)
    result = asyncio.run(engine.generate(request))
    model = eager(engine)
    wanted = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0
    )
    assert result.token_ids == tuple(wanted[0, len(prompt) :].tolist())
    assert result.spans[0].logprobs == (0.0,) * 40
