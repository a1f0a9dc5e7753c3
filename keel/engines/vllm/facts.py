"""What a server really does: asked of it where it tells, tried out where it does not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from keel.engines.base import EngineError
from keel.engines.vllm.client import ServerAnswerError, VllmClient
from keel.engines.vllm.exchange import FLOOR, Dialect

LogprobsMode = Literal["processed", "raw"]

TRIED_TOKENS = (1, 2, 3)
HOT = 2.0
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
    num_workers: int = 1
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
        num_workers=max(1, _or(parallel.get("world_size"), 1)),
        cache_bytes=_or(cache.get("kv_cache_memory_bytes"), 0),
    )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _or(value: Any, otherwise: int) -> int:
    return value if isinstance(value, int) and value >= 0 else otherwise


async def _find_dialect(client: VllmClient, model: str) -> Dialect:
    body = {"model": model, "token_ids": [1], "sampling_params": {"max_tokens": 1, "temperature": 0.0, "logprobs": 0}}
    try:
        await client.generate(body)
    except ServerAnswerError as error:
        if error.status in (403, 404, 405):
            return "completions"
        raise
    return "generate"


async def _try_logprobs(client: VllmClient, facts: ServerFacts) -> LogprobsMode:
    """Processed or raw? If log-probs are those of the distribution drawn from, the two candidates that top-k leaves
    have all of the probability and the third has none; raw ones are whatever the model says. Several prompts tell."""
    rows = [await _draw(client, facts, [token], top_k=2, num_tops=3) for token in TRIED_TOKENS]
    left = [[value for value in row if value > FLOOR] for row in rows]
    mass = [math.fsum(math.exp(min(value, 1.0)) for value in values) for values in left]
    if all(len(values) <= 2 and abs(total - 1.0) < 1e-4 for values, total in zip(left, mass, strict=True)):
        return "processed"
    if all(total < 1.0 + 1e-4 for total in mass):
        return "raw"
    raise EngineError(
        f"vllm: {client.url} returns {rows[0]} for the most likely tokens: these are no log-probs; start it with "
        "--logprobs-mode processed_logprobs"
    )


async def _draw(client: VllmClient, facts: ServerFacts, prompt: list[int], *, top_k: int, num_tops: int) -> list[float]:
    """The log-probs that come with one draw, of `num_tops` tokens."""
    settings = {"temperature": HOT, "top_k": top_k, "top_p": 1.0, "max_tokens": 1, "logprobs": num_tops}
    if facts.dialect == "generate":
        body = {"model": facts.model, "token_ids": prompt, "sampling_params": {**settings, "detokenize": False}}
        answer = await client.generate(body)
    else:
        extra = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        answer = await client.complete({"model": facts.model, "prompt": prompt, **settings, **extra})
    try:
        (choice,) = answer["choices"]
        if facts.dialect == "generate":
            return [float(top["logprob"]) for top in choice["logprobs"]["content"][0]["top_logprobs"]]
        return [float(value) for value in choice["logprobs"]["top_logprobs"][0].values()]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"vllm: {client.url} returns no log-probs ({type(error).__name__}: {error})") from error
