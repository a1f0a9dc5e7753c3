"""A vLLM server that somebody else started: asked as it is, its raw log-probs included, which a run would refuse."""

from __future__ import annotations

from dataclasses import replace

from keel.engines.base import EngineError, GenerateRequest
from keel.engines.vllm.client import VllmClient
from keel.engines.vllm.engine import VllmEngine
from keel.rollouts.loop_thread import run_once
from keel.types import SamplingSettings


class StrangersVllm(VllmEngine):
    """Draws also where the server returns raw log-probs: what that does to the gap is what is to be told."""

    def _problem_with(self, request: GenerateRequest) -> str | None:
        asked = request
        if self.facts.logprobs == "raw":
            asked = replace(request, sampling=SamplingSettings())
        return super()._problem_with(asked)


def longest_sequence(url: str) -> int:
    """Tokens that a sequence of the server at `url` may have. Raises EngineError if there is no vLLM server."""
    models = run_once(_models(url))
    found = [model.get("max_model_len") for model in models]
    known = [length for length in found if isinstance(length, int)]
    if not known:
        raise EngineError(f"the server at {url} names no model and no length; is it a vLLM server?")
    return min(known)


async def _models(url: str) -> list[dict[str, object]]:
    client = VllmClient(url, timeout_s=20.0)
    try:
        return await client.models()
    finally:
        await client.close()
