"""Attaching to a server: what it really does is found out, and what does not fit the run is refused in words."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from keel.config import EngineConfig, ModelConfig
from keel.config_vllm import VllmConfig
from keel.engines.base import EngineError, GenerateRequest, WeightSource
from keel.engines.identity import differences, identity_of
from keel.engines.vllm.engine import VllmEngine
from keel.models.tiny import build_tiny_model, build_tiny_tokenizer
from keel.sync.base import SyncError
from keel.sync.publish import choose_transport
from keel.types import SamplingSettings
from tests.unit.engines.vllm.stranger import Vllm, serving

HUNDRED = SamplingSettings(1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tiny_tokenizer(["two plus two is four"] * 20, 300)
    build_tiny_model("qwen3", path, tokenizer=tokenizer, num_hidden_layers=1)
    return ModelConfig(path=str(path))


def attach(url: str, model: ModelConfig, *, length: int = 64, **settings: Any) -> VllmEngine:
    config = EngineConfig(id="vllm", vllm=VllmConfig(url=url, **settings))
    return VllmEngine(model, config, max_sequence_tokens=length)


def ask(sampling: SamplingSettings = HUNDRED, length: int = 4) -> GenerateRequest:
    return GenerateRequest("id", "", (1, 2, 3), sampling, length, (), seed=3, return_support=sampling.is_cut)


def test_a_plain_server_is_drawn_from(model: ModelConfig) -> None:
    """No development mode, no scale-out: completions, token in and token out, and no seed, because one could end it."""
    server = Vllm()
    with serving(server) as url:
        engine = attach(url, model)
        result = asyncio.run(engine.generate(ask()))
        asyncio.run(engine.close())
    assert result.token_ids == (5, 5, 5, 5)
    assert [span.policy_version for span in result.spans] == [0]
    assert "seed" not in server.bodies[-1]
    assert server.bodies[-1]["prompt"] == [1, 2, 3]
    assert not engine.capabilities().deterministic
    assert engine.capabilities().weight_sources == ()


def test_raw_log_probs_are_found_out_and_honoured_only_where_they_are_right(model: ModelConfig) -> None:
    with serving(Vllm(mode="raw")) as url:
        engine = attach(url, model)
        assert not engine.capabilities().returns_support
        right = asyncio.run(engine.generate(ask()))
        wrong = [asyncio.run(engine.generate(ask(each))) for each in (SamplingSettings(0.7), SamplingSettings(1, 1, 5))]
    assert right.finish_reason == "length"
    assert all("processed_logprobs" in str(each.error) for each in wrong)


def test_weights_are_not_pushed_to_a_server_that_is_not_ours(model: ModelConfig) -> None:
    with serving(Vllm()) as url:
        engine = attach(url, model)
        with pytest.raises(SyncError, match="allow_weight_push"):
            asyncio.run(engine.load_weights(WeightSource("file", "/nowhere"), 1))
        engine = attach(url, model, allow_weight_push=True)
        with pytest.raises(SyncError, match="worker-extension-cls"):
            asyncio.run(engine.load_weights(WeightSource("file", "/nowhere"), 1))


def test_quantized_weights_are_never_mixed_with_the_learners(model: ModelConfig) -> None:
    """As a server of GPT-OSS's own MXFP4 checkpoint tells it, with everything else as it should be."""
    told = {
        "model_config": {"quantization": "mxfp4", "dtype": "torch.float32"},
        "parallel_config": {"worker_extension_cls": "keel_vllm_worker.extension.WorkerExtension"},
    }
    tells = {"/server_info": (200, {"vllm_config": told}), "/update_weight_version": (200, {"success": True})}
    with serving(Vllm(**tells)) as url:
        engine = attach(url, model, allow_weight_push=True)
        assert engine.capabilities().weight_sources == ()
        with pytest.raises(SyncError, match=r"quantized as mxfp4.*serve the unquantized weights"):
            asyncio.run(engine.load_weights(WeightSource("file", "/nowhere"), 1))
    with pytest.raises(SyncError, match="takes no weights: it serves weights quantized as mxfp4"):
        choose_transport("auto", engine.capabilities())


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("shorter sequences", {"/v1/models": (200, {"data": [{"id": "m", "max_model_len": 32}]})}, "--max-model-len 64"),
    ("no vLLM", {"/v1/models": (200, {"data": [{"id": "m"}]})}, "is the address right"),
    ("no JSON", {"/v1/models": (200, b"<html>\x1b[31mwelcome</html>")}, "not JSON"),
    ("no object", {"/v1/models": (200, [1])}, "an object was expected"),
    ("an error", {"/v1/models": (500, b"on fire")}, "answered 500"),
    ("no log-probs", {"/v1/completions": (200, {"choices": [{"token_ids": [5]}]})}, "no log-probs"),
    ("another tokenizer", {"/tokenize": (200, {"tokens": [1, 2, 3]})}, "another tokenizer"),
]


@pytest.mark.parametrize(("changes", "told"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_another_server_is_refused(model: ModelConfig, changes: dict[str, Any], told: str) -> None:
    with serving(Vllm(**changes)) as url, pytest.raises(EngineError, match=told) as raised:
        attach(url, model)
    assert "\x1b" not in str(raised.value)


def test_a_server_of_another_model_is_refused(model: ModelConfig, tmp_path: Any) -> None:
    build_tiny_model("qwen3", tmp_path, vocab_size=320, num_hidden_layers=2)
    with serving(Vllm(root=str(tmp_path))) as url, pytest.raises(EngineError, match="another model"):
        attach(url, model)


def test_whose_files_a_server_on_this_machine_has_is_known(model: ModelConfig, tmp_path: Any) -> None:
    """The same sizes with another constant in the norms are another model."""
    copy = tmp_path / "copy"
    shutil.copytree(model.path, copy)
    for change, told in ((None, []), ({"rms_norm_eps": 0.5}, ["rms_norm_eps of the configuration (1e-06 and 0.5)"])):
        file = copy / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **(change or {})}))
        with serving(Vllm(root=str(copy))) as url:
            theirs = attach(url, model).capabilities().identity
        assert theirs is not None
        assert differences(identity_of(model.path), theirs) == told
    with serving(Vllm(root="somebody/model")) as url:
        assert attach(url, model).capabilities().identity is None


def test_logits_are_no_log_probs(model: ModelConfig) -> None:
    def logits(body: Any) -> tuple[int, Any]:
        _, answer = Vllm()("/v1/completions", body)
        answer["choices"][0]["logprobs"]["top_logprobs"] = [{"token_id:5": 7.5, "token_id:6": 3.0}]
        return 200, answer

    changes = {"/v1/completions": logits}
    with serving(Vllm(**changes)) as url, pytest.raises(EngineError, match="no log-probs"):
        attach(url, model)


def test_nobody_at_the_address_is_told(model: ModelConfig) -> None:
    with serving(Vllm()) as url:
        pass
    with pytest.raises(EngineError, match="cannot be reached"):
        attach(url, model)


def spoilt(change: Callable[[dict[str, Any]], object]) -> Callable[[Any], tuple[int, Any]]:
    """Completions as they should be until a prompt of three tokens comes."""

    def answer(body: Any) -> tuple[int, Any]:
        status, content = Vllm()("/v1/completions", body)
        if len(body["prompt"]) == 3:
            change(content["choices"][0])
        return status, content

    return answer


SPOILT: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("a token too many", lambda choice: choice["token_ids"].append(5), "5 tokens came with 4 log-probs"),
    ("no number", lambda choice: choice["logprobs"].update(token_logprobs=[None] * 4), "cannot be read"),
    ("overflow", lambda choice: choice["logprobs"].update(token_logprobs=[-9999.0] * 4), "overflowed"),
    ("unknown end", lambda choice: choice.update(finish_reason="tired"), "cannot be read"),
    ("no tokens", lambda choice: choice.pop("token_ids"), "cannot be read"),
]


@pytest.mark.parametrize(("change", "told"), [each[1:] for each in SPOILT], ids=[each[0] for each in SPOILT])
def test_an_answer_that_does_not_add_up_is_an_error(model: ModelConfig, change: Any, told: str) -> None:
    with serving(Vllm(**{"/v1/completions": spoilt(change)})) as url:
        engine = attach(url, model)
        with pytest.raises(EngineError, match=told):
            asyncio.run(engine.generate(ask()))


def test_an_error_of_a_living_server_is_told_and_not_asked_again(model: ModelConfig) -> None:
    asked = []

    def failing(body: Any) -> tuple[int, Any]:
        if len(body["prompt"]) < 3:
            return Vllm()("/v1/completions", body)
        asked.append(body)
        return 500, b"out of luck"

    with serving(Vllm(**{"/v1/completions": failing})) as url:
        engine = attach(url, model)
        with pytest.raises(EngineError, match=r"answered 500: out of luck$"):  # it is not taken for dead
            asyncio.run(engine.generate(ask()))
    assert len(asked) == 1


def test_an_attached_server_that_is_gone_is_not_started_again(model: ModelConfig) -> None:
    with serving(Vllm()) as url:
        engine = attach(url, model)
    with pytest.raises(EngineError, match="did not start this server"):
        asyncio.run(engine.generate(ask()))
    assert not asyncio.run(engine.health()).ok


def test_a_cut_whose_rest_is_unknown_is_an_error(model: ModelConfig) -> None:
    """Two of three likely tokens have half of what top-k left each; the server says so of one alone."""

    def hides(choice: dict[str, Any]) -> None:
        choice["logprobs"]["top_logprobs"] = [{"token_id:5": -0.6931471805599453}] * 4

    with serving(Vllm(**{"/v1/completions": spoilt(hides)})) as url:
        engine = attach(url, model)
        with pytest.raises(EngineError, match=r"engine\.vllm\.max_logprobs"):
            asyncio.run(engine.generate(ask(SamplingSettings(1.0, 1.0, 2))))


def test_a_cut_is_told_token_by_token(model: ModelConfig) -> None:
    with serving(Vllm()) as url:
        result = asyncio.run(attach(url, model).generate(ask(SamplingSettings(1.0, 1.0, 2))))
    (span,) = result.spans
    assert span.support is not None
    assert span.support.counts == (2, 2, 2, 2)
    assert memoryview(span.support.ids).cast("I").tolist() == [5, 6] * 4
