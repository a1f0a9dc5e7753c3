"""What a server really does: asked of it where it tells, tried out where it does not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from keel.engines.base import EngineError
from keel.engines.vllm.client import ServerAnswerError, VllmClient
from keel.engines.vllm.exchange import Dialect, read_answer

LogprobsMode = Literal["processed", "raw"]

TRIED_TOKENS = (1, 2, 3)
HOT = 100.0
DEFAULT_MAX_LOGPROBS = 20


@dataclass(frozen=True)
class ServerFacts:
    """A server as Keel found it. What only its development mode tells is None where that is off.

    `logprobs` "processed": of the distribution drawn from; "raw": of the model at temperature 1 with nothing cut.
    `takes_weights` says that its workers have Keel's extension.
    """

    model: str
    root: str
    max_sequence_tokens: int
    dialect: Dialect
    logprobs: LogprobsMode
    max_logprobs: int
    vocab_size: int = 0
    dtype: str | None = None
    quantization: str | None = None
    on_cpu: bool | None = None
    chunked_prefill: bool | None = None
    keeps_prefix: bool = False
    returns_routes: bool = False
    returns_masks: bool = False
    batch_invariant: bool = False
    sleeps: bool = False
    tells: bool = False
    takes_weights: bool = False
    cache_bytes: int = 0

    @property
    def can_seed(self) -> bool:
        """Whether a request's own seed is safe: with a prompt fed in pieces it ends vLLM's CPU build."""
        return self.chunked_prefill is False or self.on_cpu is False


async def find_facts(client: VllmClient, *, served_name: str = "") -> ServerFacts:
    """Ask the server, and try it. Raises EngineError if it is no vLLM server that can serve token ids, or if what it
    returns is neither processed nor raw log-probs."""
    models = await client.models()
    served = next((model for model in models if not served_name or model.get("id") == served_name), None)
    if served is None or not isinstance(served.get("max_model_len"), int):
        raise EngineError(
            f"vllm: {client.url} serves {[model.get('id') for model in models]}, and no vLLM model with a "
            "max_model_len among them; is the address right?"
        )
    facts = ServerFacts(
        model=str(served["id"]),
        root=str(served.get("root") or ""),
        max_sequence_tokens=int(served["max_model_len"]),
        dialect="completions",
        logprobs="raw",
        max_logprobs=DEFAULT_MAX_LOGPROBS,
    )
    facts = await _with_told(client, facts)
    facts = replace(facts, dialect=await _find_dialect(client, facts.model))
    return replace(facts, logprobs=await _try_logprobs(client, facts))


async def _with_told(client: VllmClient, facts: ServerFacts) -> ServerFacts:
    """What development mode tells, if it is on."""
    try:
        info = await client.server_info()
    except ServerAnswerError as error:
        if error.status in (401, 403, 404, 405):
            return facts
        raise
    config = info.get("vllm_config")
    if not isinstance(config, dict):
        return facts
    model, cache, scheduler = (_section(config, name) for name in ("model_config", "cache_config", "scheduler_config"))
    parallel, device = (_section(config, name) for name in ("parallel_config", "device_config"))
    variables = info.get("vllm_env") or {}
    return replace(
        facts,
        tells=True,
        max_logprobs=_or(model.get("max_logprobs"), DEFAULT_MAX_LOGPROBS),
        vocab_size=_vocab_size(model),
        dtype=str(model.get("dtype", "")).removeprefix("torch.") or None,
        quantization=model.get("quantization"),
        on_cpu=str(device.get("device_type") or device.get("device")) == "cpu",
        chunked_prefill=bool(scheduler.get("enable_chunked_prefill")),
        keeps_prefix=bool(cache.get("enable_prefix_caching")),
        returns_routes=bool(model.get("enable_return_routed_experts")),
        returns_masks=bool(model.get("return_sampling_mask")),
        batch_invariant=str(variables.get("VLLM_BATCH_INVARIANT")) in ("1", "True"),
        sleeps=bool(model.get("enable_sleep_mode")),
        takes_weights="keel_vllm_worker" in str(parallel.get("worker_extension_cls")),
        cache_bytes=_or(cache.get("kv_cache_memory_bytes"), 0),
    )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _or(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and value >= 0 else otherwise


def _vocab_size(model: Mapping[str, Any]) -> int:
    for name in ("hf_text_config", "hf_config"):
        size = _section(model, name).get("vocab_size")
        if isinstance(size, int):
            return size
    return 0


async def _find_dialect(client: VllmClient, model: str) -> Dialect:
    body = {"model": model, "token_ids": [1], "sampling_params": {"max_tokens": 1, "temperature": 0.0, "logprobs": 0}}
    try:
        await client.generate(body)
    except ServerAnswerError as error:
        if error.status in (404, 405):
            return "completions"
        raise
    return "generate"


async def _try_logprobs(client: VllmClient, facts: ServerFacts) -> LogprobsMode:
    """Processed or raw? One candidate left by top-k has probability 1, two at a very high temperature have one half
    each, if log-probs are those of the distribution drawn from. Raw ones are whatever the model says."""
    values = [await _draw(client, facts, [token], temperature=1.0, top_k=1) for token in TRIED_TOKENS]
    halves = [await _draw(client, facts, [token], temperature=HOT, top_k=2) for token in TRIED_TOKENS]
    if all(abs(value) < 1e-5 for value in values) and all(abs(value - math.log(0.5)) < 0.25 for value in halves):
        return "processed"
    if all(value <= 1e-6 for value in (*values, *halves)):
        return "raw"
    raise EngineError(
        f"vllm: {client.url} returns {values[0]:g} for a token that alone could be drawn: that is no log-prob; start "
        "it with --logprobs-mode processed_logprobs"
    )


async def _draw(client: VllmClient, facts: ServerFacts, prompt: list[int], *, temperature: float, top_k: int) -> float:
    """The log-prob that comes with one drawn token."""
    settings = {"temperature": temperature, "top_k": top_k, "top_p": 1.0, "max_tokens": 1, "logprobs": 0}
    if facts.dialect == "generate":
        body = {"model": facts.model, "token_ids": prompt, "sampling_params": {**settings, "detokenize": False}}
        answer = await client.generate(body)
    else:
        extra = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        answer = await client.complete({"model": facts.model, "prompt": prompt, **settings, **extra})
    return read_answer(answer, facts.dialect).logprobs[0]
