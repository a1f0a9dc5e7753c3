"""Is a request possible? What is not is answered in words, so that one bad request never fails the others."""

from __future__ import annotations

import math

from keel.engines.base import GenerateRequest, GenerateResult


def problem_with(request: GenerateRequest, *, max_sequence_tokens: int, vocab_size: int, can_route: bool) -> str | None:
    """Why `request` cannot be served (what, got, fix), or None."""
    length, sampling = len(request.token_ids), request.sampling
    if length == 0:
        return "the prompt is empty; give at least one token"
    if request.max_new_tokens < 1:
        return f"max_new_tokens is {request.max_new_tokens}; it must be at least 1"
    if length + request.max_new_tokens > max_sequence_tokens:
        return (
            f"{length} prompt tokens and max_new_tokens = {request.max_new_tokens} exceed the engine's "
            f"{max_sequence_tokens} tokens per sequence; raise engine.max_sequence_tokens or ask for fewer"
        )
    if min(request.token_ids) < 0 or max(request.token_ids) >= vocab_size:
        wrong = next(token for token in request.token_ids if not 0 <= token < vocab_size)
        return f"token {wrong} is not in the vocabulary of {vocab_size}; is this the model's own tokenizer?"
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0.0):
        return f"temperature is {sampling.temperature}; it must be finite and not negative"
    if not 0.0 < sampling.top_p <= 1.0 or sampling.top_k < 0:
        return f"top_p is {sampling.top_p}, top_k is {sampling.top_k}; top_p must be in (0, 1], top_k not negative"
    if request.return_routes and not can_route:
        return "routes were asked for but are not kept; set engine.return_routes = true"
    return None


def refusal(request: GenerateRequest, problem: str) -> GenerateResult:
    """The answer to an impossible request."""
    return GenerateResult(request.request_id, (), "error", request.sampling, error=f"request refused: {problem}")
