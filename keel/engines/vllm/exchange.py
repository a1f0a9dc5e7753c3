"""Requests as the server takes them, and its answers read strictly: what does not add up is an error, never a token.

A server speaks one of two dialects. "generate" (`/inference/v1/generate`, started with --enable-scale-out) has token
ids on both ends and says which weights drew which tokens; "completions" (`/v1/completions`) is what every server has.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from keel.config_vllm import SUPPORT_SLACK
from keel.engines.base import DrawnSpan, EngineError, GenerateRequest, GenerateResult
from keel.types import FinishReason, Routes, SamplingSettings, Support

Dialect = Literal["generate", "completions"]

FLOOR = -9000.0
"""JSON has no minus infinity: the server writes -9999."""
MASS_TOLERANCE = 1e-3
FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


@dataclass(frozen=True)
class Answer:
    """One sequence as the server drew it, in either dialect. `tops[i]` are the most likely tokens at draw i with their
    log-probs, `versions` (name of the weights, first, last + 1)."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tops: tuple[Mapping[int, float], ...]
    finish_reason: FinishReason
    versions: tuple[tuple[str, int, int], ...] | None
    masks: tuple[tuple[int, ...], ...] | None
    routes: str | None
    num_cached_tokens: int


def request_body(
    request: GenerateRequest, dialect: Dialect, *, model: str, request_id: str, num_tops: int, seeded: bool
) -> dict[str, Any]:
    """What is sent for `request`. Everything that shapes the distribution is said, so that no default of the server's
    gets in; `num_tops` most likely tokens are asked for with every draw."""
    settings: dict[str, Any] = {
        "temperature": request.sampling.temperature,
        "top_p": request.sampling.top_p,
        "top_k": request.sampling.top_k,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": request.max_new_tokens,
        "stop_token_ids": list(request.stop_token_ids),
        "ignore_eos": True,  # ends after a token of stop_token_ids, and only there
        "logprobs": num_tops,
    }
    if seeded:
        settings["seed"] = request.seed % 2**63
    if dialect == "generate":
        settings["detokenize"] = False
        return {
            "request_id": request_id,
            "model": model,
            "token_ids": list(request.token_ids),
            "sampling_params": settings,
        }
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": True, "request_id": request_id}
    return {"model": model, "prompt": list(request.token_ids), **settings, **extra}


def score_body(token_ids: Sequence[int], dialect: Dialect, *, model: str, request_id: str) -> dict[str, Any]:
    """A request whose answer has the log-prob of every token given; one token is drawn because one must be."""
    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
    if dialect == "generate":
        settings["detokenize"] = False
        return {
            "request_id": request_id,
            "model": model,
            "token_ids": list(token_ids),
            "sampling_params": settings,
        }
    return {"model": model, "prompt": list(token_ids), "request_id": request_id, **settings}


def read_answer(answer: Mapping[str, Any], dialect: Dialect) -> Answer:
    """The one sequence in `answer`. Raises EngineError if anything is missing, miscounted or no number."""
    with_reading = _from_generate if dialect == "generate" else _from_completions
    try:
        (choice,) = answer["choices"]
        read = with_reading(choice, answer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(
            f"vllm: an answer that cannot be read ({type(error).__name__}: {error}); the server's version is not one "
            "that this was written for, or something between it and Keel changes answers"
        ) from error
    if not len(read.token_ids) == len(read.logprobs) == len(read.tops):
        raise EngineError(f"vllm: {len(read.token_ids)} tokens came with {len(read.logprobs)} log-probs")
    wrong = [value for value in read.logprobs if not FLOOR < value <= 1e-3]
    if wrong:
        raise EngineError(
            f"vllm: a drawn token came with the log-prob {wrong[0]!r}; the server's numbers have overflowed, or its "
            "--logprobs-mode gives logits"
        )
    return read


def read_scores(answer: Mapping[str, Any], token_ids: Sequence[int]) -> tuple[float, ...]:
    """Log-probs of `token_ids[1:]`, each given what precedes it. Raises EngineError if they are not all there."""
    try:
        rows = answer.get("prompt_logprobs") or answer["choices"][0]["prompt_logprobs"]
        logprobs = tuple(float(row[str(token)]["logprob"]) for row, token in zip(rows[1:], token_ids[1:], strict=True))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(f"vllm: log-probs of a prompt cannot be read ({type(error).__name__}: {error})") from error
    if not all(FLOOR < value <= 1e-3 for value in logprobs):
        raise EngineError("vllm: log-probs of a prompt are not all finite")
    return logprobs


def result_of(
    request: GenerateRequest, answer: Answer, *, version_of: Callable[[str | None], int], vocab_size: int
) -> GenerateResult:
    """The answer as the protocol has it. `version_of` turns the server's name of weights into a policy version."""
    num = len(answer.token_ids)
    greedy = request.sampling.temperature == 0
    logprobs = (0.0,) * num if greedy else tuple(min(value, 0.0) for value in answer.logprobs)
    support = _support_of(request, answer, vocab_size) if request.return_support and request.sampling.is_cut else None
    spans = []
    for name, start, end in _pieces(answer):
        rows = None if support is None else _rows(support, start, end)
        piece = slice(start, end)
        spans.append(DrawnSpan(answer.token_ids[piece], logprobs[piece], version_of(name), rows))
    routes = None
    if request.return_routes and answer.routes is not None:
        routes = _routes(answer.routes, len(request.token_ids) + num - 1)
    return GenerateResult(
        request.request_id,
        tuple(spans),
        answer.finish_reason,
        request.sampling,
        num_cached_tokens=answer.num_cached_tokens,
        routed_experts=routes,
    )


# ---- reading


def _from_generate(choice: Mapping[str, Any], answer: Mapping[str, Any]) -> Answer:
    token_ids = tuple(int(token) for token in choice["token_ids"])
    content = (choice["logprobs"] or {}).get("content") or []
    if [entry["token_id"] for entry in content] != list(token_ids):
        raise ValueError("log-probs of other tokens than those drawn")
    spans = choice.get("weight_versions")
    masks = choice.get("sampling_mask")
    return Answer(
        token_ids,
        tuple(float(entry["logprob"]) for entry in content),
        tuple({top["token_id"]: float(top["logprob"]) for top in entry["top_logprobs"]} for entry in content),
        FINISH_REASONS[choice["finish_reason"]],
        None if spans is None else tuple((str(span["version"]), span["start"], span["end"]) for span in spans),
        None if masks is None else tuple(tuple(int(token) for token in row) for row in masks),
        choice.get("routed_experts"),
        _num_cached(answer),
    )


def _from_completions(choice: Mapping[str, Any], answer: Mapping[str, Any]) -> Answer:
    logprobs = choice["logprobs"]
    tops = logprobs["top_logprobs"] or [{}] * len(choice["token_ids"])
    return Answer(
        tuple(int(token) for token in choice["token_ids"]),
        tuple(float(value) for value in logprobs["token_logprobs"]),
        tuple({int(name.removeprefix("token_id:")): float(value) for name, value in row.items()} for row in tops),
        FINISH_REASONS[choice["finish_reason"]],
        None,
        None,
        choice.get("routed_experts"),
        _num_cached(answer),
    )


def _num_cached(answer: Mapping[str, Any]) -> int:
    details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def _pieces(answer: Answer) -> list[tuple[str | None, int, int]]:
    """Which weights drew which tokens; checked to cover all of them, in order."""
    num = len(answer.token_ids)
    if answer.versions is None:
        return [(None, 0, num)] if num else []
    ends = [0]
    for _, start, end in answer.versions:
        if start != ends[-1] or end < start:
            raise EngineError(f"vllm: weight versions {answer.versions} do not cover {num} drawn tokens in order")
        ends.append(end)
    if ends[-1] != num:
        raise EngineError(f"vllm: weight versions {answer.versions} do not cover {num} drawn tokens")
    return [piece for piece in answer.versions if piece[1] < piece[2]]


def _support_of(request: GenerateRequest, answer: Answer, vocab_size: int) -> Support:
    """What top-k and top-p left, draw by draw: the server's own mask where it gives one, else the most likely tokens
    whose processed log-prob is not minus infinity, which must then have all of the probability."""
    if answer.masks is not None and len(answer.masks) == len(answer.token_ids):
        rows = [sorted({*mask, token}) for mask, token in zip(answer.masks, answer.token_ids, strict=True)]
    else:
        rows = []
        for token, tops in zip(answer.token_ids, answer.tops, strict=True):
            left = {known: value for known, value in tops.items() if value > FLOOR}
            mass = math.fsum(math.exp(value) for value in left.values())
            if token not in left or abs(mass - 1.0) > MASS_TOLERANCE:
                raise EngineError(
                    f"vllm: the {len(left)} most likely tokens have {mass:.4f} of the probability that "
                    f"{request.sampling} left, so the rest of what could be drawn is unknown; raise "
                    "engine.vllm.max_logprobs, or cut more with rollout.top_k"
                )
            rows.append(sorted(left))
    # A row of the whole vocabulary says that nothing was cut there.
    rows = [[] if len(row) >= vocab_size > 0 else row for row in rows]
    ids = array("I", [token for row in rows for token in row])
    return Support(tuple(len(row) for row in rows), ids.tobytes())


def _rows(support: Support, start: int, end: int) -> Support:
    first, last = 4 * sum(support.counts[:start]), 4 * sum(support.counts[:end])
    return Support(support.counts[start:end], support.ids[first:last])


def _routes(encoded: str, num_fed: int) -> Routes:
    """The experts of every token that was fed, prompt included."""
    try:
        chosen = np.load(io.BytesIO(base64.b64decode(encoded, validate=True)), allow_pickle=False)
    except (binascii.Error, ValueError, OSError) as error:
        raise EngineError(f"vllm: routes that cannot be read: {error}") from error
    if chosen.ndim != 3 or chosen.shape[0] != num_fed:
        raise EngineError(f"vllm: routes of shape {chosen.shape} for {num_fed} tokens that were fed")
    return Routes(chosen.astype(np.uint16).tobytes(), *chosen.shape)


def num_tops(sampling: SamplingSettings, *, wanted: bool, has_masks: bool, max_logprobs: int, vocab_size: int) -> int:
    """How many most likely tokens must come with every draw so that the support of `sampling` is known."""
    if not wanted or has_masks or not sampling.is_cut:
        return 0
    most = min(max_logprobs, vocab_size) if vocab_size else max_logprobs
    return min(sampling.top_k + SUPPORT_SLACK, most) if sampling.top_k else most
