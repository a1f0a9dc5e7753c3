"""Passes straight from the parameters say what the modules say, and leave hooks, faults and adapters their due."""

from __future__ import annotations

import asyncio

import pytest
import torch

from keel.config import EngineConfig
from keel.engines.base import GenerateRequest
from keel.engines.embedded import EmbeddedEngine
from keel.models import lean
from keel.models.distorted.modules import seen_as
from keel.models.policy import PolicyModel
from keel.types import SamplingSettings

PROMPT = tuple(range(30, 71))


def load(tiny_checkpoint, preset, dtype="float32", **options):
    return PolicyModel.load(tiny_checkpoint(preset, num_hidden_layers=3), dtype=dtype, **options)


def turns(policy, *, hook_at=None):
    """Two turns of a session; a module gets a hook before turn number `hook_at`. The log-probs, and the engine."""
    engine = EmbeddedEngine(policy, EngineConfig(slots=3, prefill_tile=32), max_sequence_tokens=96)
    layer = policy.model.base_model.layers[1]

    async def main():
        tokens, logprobs = PROMPT, []
        for number in range(2):
            handle = layer.register_forward_hook(lambda *_: None) if number == hook_at else None
            request = GenerateRequest("r", "s", tokens, SamplingSettings(), 12, (), 5)
            result = await engine.generate(request)
            if handle is not None:
                handle.remove()
            tokens = (*tokens, *result.token_ids, 9, 8, 7)
            logprobs += result.spans[0].logprobs
        return tokens, torch.tensor(logprobs)

    return *asyncio.run(main()), engine


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3", "qwen3_moe"])
def test_lean_passes_and_the_modules_agree_and_may_follow_each_other_over_one_cache(tiny_checkpoint, preset):
    policy = load(tiny_checkpoint, preset)
    tokens, logprobs, engine = turns(policy)
    counts = engine.statistics()
    assert counts["lean_passes"] == counts["decode_passes"] + counts["prefill_passes"]
    for hook_at in (0, 1):
        again, found, hooked = turns(policy, hook_at=hook_at)
        counts = hooked.statistics()
        assert 0 < counts["lean_passes"] < counts["decode_passes"] + counts["prefill_passes"]
        assert again == tokens
        assert (found - logprobs).abs().max() < 1e-5


def test_a_parameter_that_is_seen_otherwise_is_seen_so(tiny_checkpoint):
    policy = load(tiny_checkpoint, "gpt_oss")
    _, straight, _ = turns(policy)
    with seen_as(policy.model.base_model.layers[1].self_attn, {"sinks": lambda sinks: sinks - 1e4}):
        _, without, engine = turns(policy)
    assert engine.statistics()["lean_passes"] > 0
    assert (without - straight)[:1].abs() > 1e-3


def test_what_is_not_known_runs_its_modules_and_says_why(tiny_checkpoint):
    assert lean.problem(load(tiny_checkpoint, "qwen3")) == ""
    assert "exact" in lean.problem(load(tiny_checkpoint, "qwen3", numerics="exact"))
    assert "eager" in lean.problem(load(tiny_checkpoint, "gpt_oss", attention="eager"))
    policy = load(tiny_checkpoint, "qwen3")

    class Other(torch.nn.Linear):
        pass

    policy.model.base_model.layers[2].self_attn.k_proj.__class__ = Other
    assert "projection" in lean.problem(policy)
    with pytest.raises(ValueError, match="run the modules"):
        lean.LeanTrunk(policy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_step_of_rows_is_measured_and_holds_for_other_tokens(tiny_checkpoint, dtype):
    policy = load(tiny_checkpoint, "gpt_oss", dtype)
    trunk = lean.LeanTrunk(policy)
    step = trunk.row_step()
    assert step in (0, 32 * torch.get_num_threads())
    if step == 0:
        return
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(policy.info.vocab_size, (6 * step,), generator=generator)
    places = torch.arange(6 * step) % 50
    whole, _ = trunk(ids, places, lean._OwnRows(), with_routes=False)
    for rows in (slice(0, step), slice(5, 5 + 4 * step)):
        part, _ = trunk(ids[rows], places[rows], lean._OwnRows(), with_routes=False)
        assert torch.equal(part, whole[rows])


def test_heights_that_matter_are_found_out(tiny_checkpoint, monkeypatch):
    policy = load(tiny_checkpoint, "gpt_oss")
    plain = lean.product

    def by_height(left, right, *, rows, bias=None):
        return plain(left, right, rows=rows, bias=bias) * (1.0 + 1e-6 * (rows > 64 * torch.get_num_threads()))

    monkeypatch.setattr(lean, "product", by_height)
    assert lean.LeanTrunk(policy).row_step() == 0
    engine = EmbeddedEngine(policy, EngineConfig(slots=3, prefill_tile=32), max_sequence_tokens=96)
    assert engine._passes.row_step == 0
