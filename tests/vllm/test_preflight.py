"""A vLLM server that Keel did not start, and a trainer in plain transformers: healthy, and with planted faults."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.preflights.opened import opened_stack
from keel.preflights.result import PreflightResult
from keel.preflights.runner import run_checks
from keel.types import SamplingSettings
from tests.vllm_servers import PYTHON

LENGTH = 256


@pytest.fixture(scope="module")
def plain_server(vllm_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and model of a server with vLLM's defaults: raw log-probs, no development mode, nothing of Keel's."""
    model = vllm_model("gpt_oss")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", str(LENGTH), "--enforce-eager"]
    command += ["--skip-tokenizer-init", "--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("PYTHONPATH", None)
    log = tmp_path_factory.mktemp("plain-vllm") / "vllm.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            wait_until_healthy(server, port, log)
            yield f"http://127.0.0.1:{port}", model
        finally:
            server.terminate()
            server.wait(60)


def wait_until_healthy(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            with suppress(subprocess.TimeoutExpired):
                server.wait(0.5)
    pytest.fail(log.read_text()[-3000:])


def checked(server: tuple[str, str], plant: Callable[[Any], Any] | None = None, **options: Any) -> PreflightResult:
    """A preflight of the server, with `plant(model)` (a context) around a trainer that is healthy without it."""
    url, model = server
    with ExitStack() as closing:
        stack = closing.enter_context(opened_stack(model, engine=url, device="cpu", **options))
        if plant is not None:
            closing.enter_context(plant(stack.trainer.model))
        return run_checks(stack, seed=5, share=0.3)


def raised(result: PreflightResult) -> dict[str, str]:
    return {check.id: check.reason for check in result.checks if check.status in ("warn", "fail")}


def test_nothing_is_raised_where_both_sides_are_right(plain_server):
    result = checked(plain_server)
    assert raised(result) == {}
    assert result.causes == ()
    assert result.gap["abs_p90"] < 2e-5
    skipped = {check.id: check.reason for check in result.checks if check.status == "skip"}
    assert "--allow-weight-push" in skipped["weights"]
    assert json.dumps(result.to_json())


@contextmanager
def without_sinks(model: Any) -> Iterator[None]:
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.fill_(-1e4)
    yield


@contextmanager
def another_window(model: Any, width: int) -> Iterator[None]:
    model.config.sliding_window = width
    for layer in model.base_model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = width
    yield


@contextmanager
def another_theta(model: Any) -> Iterator[None]:
    model.base_model.rotary_emb.inv_freq.mul_(0.5)
    yield


@contextmanager
def exchanged_experts(model: Any) -> Iterator[None]:
    for layer in model.base_model.layers:
        experts = layer.mlp.experts
        for weight in (experts.gate_up_proj, experts.gate_up_proj_bias):
            swapped = torch.stack((weight[..., 1::2], weight[..., ::2]), dim=-1).flatten(-2)
            weight.data.copy_(swapped)
    yield


PLANTED = {
    "sinks_dropped": (without_sinks, {}),
    "window_off": (lambda model: another_window(model, 100_000), {}),
    "window_off_by_one": (lambda model: another_window(model, 31), {}),
    "wrong_rope_scaling": (another_theta, {}),
    "transposed_experts": (exchanged_experts, {}),
    "raw_logprobs": (None, {"sampling": SamplingSettings(0.7)}),
}


@pytest.mark.parametrize("cause", list(PLANTED))
def test_a_fault_beside_a_stranger_s_server_is_named(cause, plain_server):
    plant, options = PLANTED[cause]
    result = checked(plain_server, plant, **options)
    assert result.verdict == "fail"
    assert cause in result.causes[:3], result.attribution
    named = next(each for each in result.attribution if each.cause == cause)
    assert named.side == ("engine" if cause == "raw_logprobs" else "learner")
