"""A preflight over HTTP of a server that is not Keel's: plain transformers answering as vLLM's own defaults do."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.models.tiny import build_tiny_model
from keel.preflights.opened import opened_stack
from keel.preflights.result import PreflightResult
from keel.preflights.runner import run_checks
from keel.types import SamplingSettings
from tests.unit.engines.vllm.stranger import Answer, serving

LENGTH = 128


class Served:
    """A model in eager attention behind vLLM's completions: raw log-probs, no development mode, no scale-out."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
        self.lock = threading.Lock()

    def __call__(self, path: str, body: Mapping[str, Any]) -> Answer:
        if path == "/health":
            return 200, b""
        if path == "/v1/models":
            return 200, {"data": [{"id": "m", "root": "", "max_model_len": LENGTH}]}
        if path == "/inference/v1/generate":
            return 403, {"error": {"message": "Scale-out endpoints are disabled."}}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        with self.lock, torch.no_grad():
            return 200, {"choices": [self.drawn(body)], "usage": {}}

    def drawn(self, body: Mapping[str, Any]) -> dict[str, Any]:
        tokens, start = list(body["prompt"]), len(body["prompt"])
        generator = torch.Generator().manual_seed(sum(tokens))
        logprobs, rows, reason = [], [], "length"
        for _ in range(body["max_tokens"]):
            raw = torch.log_softmax(self.model(torch.tensor([tokens])).logits[0, -1].double(), -1)
            token = self.one(raw, body, generator)
            tokens.append(token)
            logprobs.append(float(raw[token]))
            best = raw.topk(max(1, body.get("logprobs") or 1))
            rows.append({f"token_id:{i}": float(v) for i, v in zip(best.indices.tolist(), best.values, strict=True)})
            if token in body.get("stop_token_ids", ()):
                reason = "stop"
                break
        choice: dict[str, Any] = {
            "token_ids": tokens[start:],
            "logprobs": {"token_logprobs": logprobs, "top_logprobs": rows},
            "finish_reason": reason,
        }
        if body.get("prompt_logprobs") is not None:
            choice["prompt_logprobs"] = self.scored(tokens[:start])
        return choice

    @staticmethod
    def one(raw: torch.Tensor, body: Mapping[str, Any], generator: torch.Generator) -> int:
        temperature = body.get("temperature", 1.0)
        if temperature == 0:
            return int(raw.argmax())
        return int(torch.multinomial(torch.softmax(raw / temperature, -1), 1, generator=generator))

    def scored(self, tokens: list[int]) -> list[dict[str, Any] | None]:
        rows = torch.log_softmax(self.model(torch.tensor([tokens])).logits[0, :-1].double(), -1)
        return [None, *({str(t): {"logprob": float(row[t])}} for row, t in zip(rows, tokens[1:], strict=True))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("stranger")
    small = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 40, "head_dim": 16, "sliding_window": 16}
    build_tiny_model("gpt_oss", path, vocab_size=300, seed=4, **small)
    return str(path)


@pytest.fixture(scope="module")
def address(model: str) -> Iterator[str]:
    with serving(Served(model)) as url:
        yield url


def checked(model: str, url: str, plant: Callable[[Any], None] | None = None, **options: Any) -> PreflightResult:
    with opened_stack(model, engine=url, device="cpu", **options) as stack:
        if plant is not None:
            plant(stack.trainer.model)
        return run_checks(stack, seed=5, share=0.1)


def test_nothing_is_raised_where_both_sides_are_right(model, address):
    result = checked(model, address)
    assert {check.id: check.reason for check in result.checks if check.status in ("warn", "fail")} == {}
    assert result.causes == ()
    skipped = {check.id: check.reason for check in result.checks if check.status == "skip"}
    assert "--allow-weight-push" in skipped["weights"]
    assert "tokenizer" in skipped["round_trip"]
    assert math.isfinite(result.gap["k3"])


def without_sinks(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.fill_(-1e4)


def with_window(width: int) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        model.config.sliding_window = width
        for layer in model.base_model.layers:
            if layer.self_attn.sliding_window is not None:
                layer.self_attn.sliding_window = width

    return plant


def with_another_theta(model: Any) -> None:
    model.base_model.rotary_emb.inv_freq.mul_(0.5)


def with_exchanged_experts(model: Any) -> None:
    for layer in model.base_model.layers:
        experts = layer.mlp.experts
        for weight in (experts.gate_up_proj, experts.gate_up_proj_bias):
            weight.data.copy_(torch.stack((weight[..., 1::2], weight[..., ::2]), dim=-1).flatten(-2))


@pytest.mark.parametrize(
    ("cause", "side", "plant", "options"),
    [
        ("sinks_dropped", "learner", without_sinks, {}),
        ("window_off", "learner", with_window(1000), {}),
        ("window_off_by_one", "learner", with_window(15), {}),
        ("wrong_rope_scaling", "learner", with_another_theta, {}),
        ("transposed_experts", "learner", with_exchanged_experts, {}),
        ("raw_logprobs", "engine", None, {"sampling": SamplingSettings(0.6)}),
    ],
)
def test_a_fault_beside_a_stranger_s_server_is_named(cause, side, plant, options, model, address):
    result = checked(model, address, plant, **options)
    assert result.verdict == "fail"
    assert (cause, side) in {(each.cause, each.side) for each in result.attribution[:3]}
