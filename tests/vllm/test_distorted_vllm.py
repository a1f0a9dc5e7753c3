"""Faults planted in a real vLLM: what it then says is what plain `transformers` says when changed by hand."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from keel.config import EngineConfig, ModelConfig
from keel.config_vllm import VllmConfig
from keel.distortion import Distortion
from keel.engines.distorted import DistortedEngine, distort_engine
from keel.engines.vllm.engine import VllmEngine
from keel.sync.base import WeightSource
from keel.sync.transports import write_weights
from tests import faults
from tests.faults import CAPACITY, Asked, plain, plain_logprobs, prompt_of, reported, request_of

PROMPT = prompt_of(70)
NOISE = 5e-5
SEEN = 1e-3


@pytest.fixture(scope="module")
def directory(vllm_model):
    return Path(vllm_model("gpt_oss"))


@pytest.fixture(scope="module")
def healthy(one_engine, directory, tmp_path_factory):
    """One server for all faults of pushes, requests and results, with the directory's weights."""
    engine = one_engine("gpt_oss")
    push(engine, weights_of(plain(directory)), 1, tmp_path_factory.mktemp("weights"))
    yield engine
    one_engine.close()  # what others find must not be what was pushed here


def weights_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def push(engine, weights, version, directory):
    location = directory / f"{version}"
    write_weights(location, weights, version=version)
    asyncio.run(engine.load_weights(WeightSource("file", str(location)), version))


def answered(engine, **fields) -> tuple[Asked, torch.Tensor]:
    request = replace(request_of(PROMPT, **fields), return_routes=False)
    result = asyncio.run(faults.draw(engine, request, close=False))
    assert result.sampling == request.sampling
    return Asked(PROMPT, result.token_ids, request.sampling.temperature), reported(result)


def assert_is(said, asked, right, wrong):
    """`said` is what the model `right` says, and not what `wrong` does."""
    torch.testing.assert_close(said, plain_logprobs(right, asked), rtol=0, atol=NOISE)
    assert (said - plain_logprobs(wrong, asked)).abs().mean() > SEEN


def no_sinks(model):
    for layer in model.model.layers:
        layer.self_attn.sinks.fill_(-torch.inf)


def no_window_and_other_theta(config):
    config.sliding_window = 100000
    config.rope_parameters = {**config.rope_parameters, "rope_theta": config.rope_parameters["rope_theta"] * 2}


def no_window(config):
    config.sliding_window = 100000


def test_raw_and_shifted_logprobs(healthy, directory):
    model = plain(directory)
    asked, said = answered(healthy, temperature=0.7)
    torch.testing.assert_close(said, plain_logprobs(model, asked), rtol=0, atol=NOISE)
    asked, said = answered(DistortedEngine(healthy, [Distortion("raw_logprobs")], directory), temperature=0.7)
    torch.testing.assert_close(said, plain_logprobs(model, replace(asked, temperature=1.0)), rtol=0, atol=NOISE)
    assert (said - plain_logprobs(model, asked)).abs().mean() > SEEN
    asked, said = answered(DistortedEngine(healthy, [Distortion("shifted_logprobs", 1)], directory))
    torch.testing.assert_close(said[1:], plain_logprobs(model, asked)[:-1], rtol=0, atol=NOISE)


def test_faults_of_pushes(healthy, directory, tmp_path):
    """A group that stays behind, sinks that no push brings, and the healthy weights again."""
    start = weights_of(plain(directory))
    generator = torch.Generator().manual_seed(9)
    moved = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator) for name, tensor in sorted(start.items())
    }

    def with_weights(weights):
        def change(model):
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])

        return plain(directory, change=change)

    group = "experts.gate_up_proj"
    stale = DistortedEngine(healthy, [Distortion("stale_tensor_group", group=group)], directory)
    push(stale, start, 2, tmp_path)
    push(stale, moved, 3, tmp_path)
    asked, said = answered(stale)
    mixed = {name: start[name] if name.endswith(group) else tensor for name, tensor in moved.items()}
    assert_is(said, asked, with_weights(mixed), with_weights(moved))

    sinkless = DistortedEngine(healthy, [Distortion("sinks_dropped")], directory)
    push(sinkless, moved, 4, tmp_path)
    asked, said = answered(sinkless)
    right = with_weights(moved)
    with torch.no_grad():
        no_sinks(right)
    assert_is(said, asked, right, with_weights(moved))

    push(healthy, start, 5, tmp_path)
    asked, said = answered(healthy)
    torch.testing.assert_close(said, plain_logprobs(plain(directory), asked), rtol=0, atol=NOISE)


def test_faults_of_the_directory(one_engine, directory, vllm_python):
    """Window, rotary positions and sinks in one server: each of the three is seen beside the others."""
    planted = [Distortion("window_off"), Distortion("wrong_rope_scaling", 1), Distortion("sinks_dropped")]
    one_engine.close()
    settings = EngineConfig(id="vllm", vllm=VllmConfig(python=vllm_python, kv_cache_gib=0.25))

    def make(path: Path) -> VllmEngine:
        return VllmEngine(ModelConfig(path=str(path)), settings, max_sequence_tokens=CAPACITY)

    engine = distort_engine(make, directory, planted)
    try:
        asked, said = answered(engine)
    finally:
        asyncio.run(engine.close())
    right = plain(directory, configure=no_window_and_other_theta, change=no_sinks)
    assert_is(said, asked, right, plain(directory, configure=no_window_and_other_theta))
    assert_is(said, asked, right, plain(directory, configure=no_window, change=no_sinks))
    assert_is(said, asked, right, plain(directory, change=no_sinks))
