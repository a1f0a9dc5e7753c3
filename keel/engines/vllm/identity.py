"""Is the server the one that the run needs? Model, type, length and tokenizer, as far as it tells."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tokenizers import Tokenizer
from transformers import AutoConfig

from keel.config import ModelConfig
from keel.config_vllm import VllmConfig
from keel.engines.base import EngineError
from keel.engines.identity import ModelIdentity, identity_of
from keel.engines.vllm.client import ServerAnswerError, VllmClient
from keel.engines.vllm.facts import ServerFacts

PROBE_TEXT = "<|start|>user<|message|>Two plus 2 = four, naïve façade 数\n\tend<|end|>"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
COMPARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def read_config(model: ModelConfig) -> Any:
    """The `transformers` configuration of the model's text half."""
    whole = AutoConfig.from_pretrained(
        model.path, revision=model.revision or None, trust_remote_code=model.trust_remote_code
    )
    return whole.get_text_config()


def read_vocab_size(model: ModelConfig) -> int:
    """Tokens in the model's vocabulary."""
    return int(read_config(model).vocab_size)


def served_identity(
    model: ModelConfig, facts: ServerFacts, config: VllmConfig, overrides: Mapping[str, Any]
) -> ModelIdentity | None:
    """Tokenizer, template and configuration of what is served: of the files that the server was started with, its
    `overrides` in them. None for one that was attached to, unless its directory is on this machine."""
    if config.url and not (urlsplit(config.url).hostname in LOOPBACK and Path(facts.root).is_dir()):
        return None
    path, revision = (facts.root, "") if config.url else (model.path, model.revision)
    found = identity_of(path, revision=revision, trust_remote_code=model.trust_remote_code)
    changed = {name: json.dumps(value, sort_keys=True) for name, value in overrides.items()}
    return dataclasses.replace(found, config={**found.config, **changed})


def push_problem(facts: ServerFacts, config: VllmConfig) -> str | None:
    """Why weights cannot be pushed to this server, or None."""
    if config.url and not config.allow_weight_push:
        return "Keel only attached to this server; set engine.vllm.allow_weight_push = true if it may be changed"
    if facts.quantization:
        return (
            f"it serves weights quantized as {facts.quantization}, so the policy that acts would not be the one that "
            "learns; serve the unquantized weights"
        )
    if not facts.takes_weights:
        return (
            "its workers lack Keel's extension: start it in development mode (VLLM_SERVER_DEV_MODE=1) with "
            "--worker-extension-cls keel_vllm_worker.extension.WorkerExtension and that package on its PYTHONPATH, as "
            "docs/vllm.md says"
        )
    if facts.dialect != "generate":
        return "it does not say which weights drew a token: start it with --enable-scale-out"
    return None


async def check_server(
    client: VllmClient, facts: ServerFacts, model: ModelConfig, max_sequence_tokens: int, config: VllmConfig
) -> None:
    """Raises EngineError if the server is not one for this model and these lengths."""
    where = f"vllm: the server at {client.url}"
    if facts.max_sequence_tokens < max_sequence_tokens:
        raise EngineError(
            f"{where} takes sequences of {facts.max_sequence_tokens} tokens, the run needs {max_sequence_tokens}; "
            f"start it with --max-model-len {max_sequence_tokens}, or lower rollout.max_sequence_tokens"
        )
    if facts.dtype and facts.dtype != model.dtype:
        raise EngineError(
            f"{where} computes in {facts.dtype}, model.dtype is {model.dtype!r}; start it with --dtype {model.dtype}, "
            "or change model.dtype"
        )
    if config.url:
        await _check_model(client, facts, model, where)
        await _check_tokenizer(client, facts, model, where)


async def _check_model(client: VllmClient, facts: ServerFacts, model: ModelConfig, where: str) -> None:
    """The model's measures, as far as the server tells them: itself, or by a directory that is on this machine too."""
    told: dict[str, Any] = {}
    if facts.tells:
        section = (await client.server_info())["vllm_config"].get("model_config", {})
        found = section.get("hf_text_config") or section.get("hf_config")
        told = found if isinstance(found, dict) else {}
    file = Path(facts.root) / "config.json"
    if not told and file.is_file():
        told = json.loads(file.read_text(encoding="utf-8"))
    wanted = read_config(model)
    for name in COMPARED:
        theirs, ours = told.get(name), getattr(wanted, name, None)
        if isinstance(theirs, int) and ours is not None and theirs != ours:
            raise EngineError(
                f"{where} serves another model ({facts.root}): its {name} is {theirs}, that of model.path = "
                f"{model.path!r} is {ours}; start it with that model, or change model.path"
            )


async def _check_tokenizer(client: VllmClient, facts: ServerFacts, model: ModelConfig, where: str) -> None:
    """A text as both make tokens of it. A server without a tokenizer has none that could differ."""
    file = Path(model.path) / "tokenizer.json"
    if not file.is_file():
        return
    body = {"model": facts.model, "prompt": PROBE_TEXT, "add_special_tokens": False}
    try:
        answer = await client.post("/tokenize", body)
    except ServerAnswerError:
        return
    theirs = list(answer.get("tokens", [])) if isinstance(answer, dict) else []
    ours = Tokenizer.from_file(str(file)).encode(PROBE_TEXT, add_special_tokens=False).ids
    if theirs != ours:
        raise EngineError(
            f"{where} has another tokenizer than model.path = {model.path!r}: a probe text becomes {theirs[:12]} there "
            f"and {ours[:12]} here; start it with --tokenizer {model.path}"
        )
