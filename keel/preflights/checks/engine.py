"""The engine alone: it stops where it is told and keeps the token, repeats itself, and remembers a session rightly."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from keel.engines.base import EngineError, GenerateRequest, GenerateResult
from keel.engines.identity import IdentityError, identity_of, refuse_differences
from keel.preflights.context import Context, SkippedError, check
from keel.preflights.probes import random_tokens
from keel.preflights.result import Check, Status
from keel.types import SamplingSettings

PLAIN = SamplingSettings()
LEAST_LENGTH = 80
"""Tokens that these questions' longest sequence has."""


def check_health(context: Context) -> Iterator[Check]:
    """Does it answer, and what can it do?"""
    engine = context.stack.engine
    health, able = engine.health(), engine.capabilities()
    yield check(
        "engine",
        "the engine answers",
        "pass" if health.ok else "fail",
        f"{able.name}: {able.max_sequence_tokens} tokens per sequence, {able.max_concurrency} at once"
        + (f"; {health.detail}" if health.detail else ""),
        fix="see the engine's log and address",
        returns_routes=able.returns_routes,
        returns_support=able.returns_support,
        keeps_prefix=able.keeps_prefix,
        weight_sources=list(able.weight_sources),
        deterministic=able.deterministic,
    )


def check_identity(context: Context) -> Iterator[Check]:
    """Do both sides have the same tokenizer, chat template, configuration and revision?"""
    stack = context.stack
    theirs = stack.engine.capabilities().identity
    if theirs is None:
        raise SkippedError(f"{stack.engine.name} does not tell which files it serves")
    source = stack.source
    mine = identity_of(source.path, revision=source.revision, trust_remote_code=source.trust_remote_code)
    problem = ""
    try:
        refuse_differences(mine, theirs, who=("the trainer", "the engine"), fix="serve the trainer's directory")
    except IdentityError as error:
        problem = str(error)
    yield check(
        "identity",
        "both sides have the same tokenizer, template and configuration",
        "fail" if problem else "pass",
        problem or f"tokenizer, chat template and {len(mine.config)} fields of the configuration are the same",
        fix="serve the directory that the trainer loads, at the same revision",
    )


def check_stopping(context: Context) -> Iterator[Check]:
    """Does it stop right after a stop token, and is that token part of the answer?

    Half of the vocabulary is made stop tokens, so that the wait for one is short whatever the model has learned.
    """
    stack = context.stack
    stops = tuple(range(1, stack.trainer.info.vocab_size, 2))[:512]
    requests = [_request(context, f"stop-{index}", 9 + index, 48, stops=stops) for index in range(4)]
    chat_stops = set(stack.chat.stop_token_ids if stack.chat is not None else ())
    results = _asked(context, requests)
    faults = []
    for result in results:
        ids = result.token_ids
        if result.finish_reason == "stop" and (not ids or ids[-1] not in stops):
            faults.append(
                f"a reply ends with reason 'stop' and token {ids[-1] if ids else None}: the stop token is lost"
            )
        elif any(token in set(stops) for token in ids[:-1]):
            faults.append("a reply goes on after a stop token")
    for each in context.probes().sequences:
        for reply in each.replies:
            drawn = each.token_ids[reply.start : reply.stop].tolist()
            if reply.finish_reason == "stop" and drawn[-1] not in chat_stops:
                faults.append("a reply of a conversation ends with reason 'stop' and without its stop token")
    stopped = sum(result.finish_reason == "stop" for result in results)
    yield check(
        "stopping",
        "a reply ends with its stop token",
        "fail" if faults else "pass",
        "; ".join(dict.fromkeys(faults)) or f"{stopped} of {len(results)} replies met a stop token, and end with it",
        figure=float(len(faults)),
        threshold=0.0,
        unit="replies",
        fix="keep the stop token in the reply: return token ids, not text (vLLM: include_stop_str_in_output)",
        cause="lost_stop_token" if faults else "",
    )


def check_determinism(context: Context) -> Iterator[Check]:
    """Do the same requests with the same seeds give the same tokens and log-probs?"""
    sampling = context.stack.sampling
    requests = [_request(context, f"twice-{index}", 12 + 3 * index, 24, sampling=sampling) for index in range(4)]
    first, again = _asked(context, requests), _asked(context, requests)
    same_tokens = sum(a.token_ids == b.token_ids for a, b in zip(first, again, strict=True))
    largest = max(_largest_gap(a, b) for a, b in zip(first, again, strict=True))
    promised = context.stack.engine.capabilities().deterministic
    exact = same_tokens == len(requests) and largest == 0
    status: Status = "pass" if exact or not promised else "warn"
    yield check(
        "determinism",
        "the same seed gives the same reply",
        status,
        f"{same_tokens} of {len(requests)} replies are the same tokens again; log-probs of what they share differ "
        f"by up to {largest:.2g} nats" + ("" if promised else "; the engine does not promise more"),
        figure=largest,
        threshold=0.0 if promised else None,
        unit="nats",
        fix="a run on this engine cannot be repeated: leave nothing else running on it, fix its batch size",
        same=same_tokens,
    )


def check_sessions(context: Context) -> Iterator[Check]:
    """Are the log-probs of a later turn, whose beginning the engine kept, those of the same tokens fed afresh?"""
    able = context.stack.engine.capabilities()
    rng = random.Random(f"sessions {context.plan.seed}")
    first = [_request(context, f"kept-{index}", 11 + 8 * index, 12, session=f"kept-{index}") for index in range(4)]
    drawn = _asked(context, first, keep=True)
    later = []
    for request, result in zip(first, drawn, strict=True):
        tokens = (*request.token_ids, *result.token_ids, *random_tokens(context.stack, rng, 9))
        name = f"{request.request_id}-2"
        later.append(GenerateRequest(name, request.session_id, tokens, PLAIN, 12, (), request.seed + 1))
    results = _asked(context, later)
    early = [_against_score(context, r, out) for r, out in zip(first, drawn, strict=True)]
    late = [_against_score(context, r, out) for r, out in zip(later, results, strict=True)]
    # What is wrong with every draw (a temperature, say) is the gap's business: turns are compared with one another.
    level = max(context.noise().threshold, 3 * float(np.mean(np.concatenate(early))))
    size = float(np.mean(np.concatenate(late)))
    cached = sum(result.num_cached_tokens for result in results)
    yield check(
        "sessions",
        "keys and values kept over turns are right",
        "pass" if size <= level else "fail",
        f"log-probs of a second turn differ from the same tokens scored afresh by {size:.2g} nats in the mean, "
        f"those of a first turn by {float(np.mean(np.concatenate(early))):.2g}; "
        + (f"{cached} tokens were kept" if cached else "the engine told of no tokens that it kept"),
        figure=size,
        threshold=level,
        unit="nats",
        fix="switch prefix caching off, and see whether turns are tokenized again or old keys are kept over an update",
        keeps_prefix=able.keeps_prefix,
        cached_tokens=cached,
    )


def _request(
    context: Context,
    name: str,
    length: int,
    new_tokens: int,
    *,
    stops: tuple[int, ...] = (),
    session: str = "",
    sampling: SamplingSettings = PLAIN,
) -> GenerateRequest:
    if context.plan.max_sequence_tokens < LEAST_LENGTH:
        raise SkippedError(f"sequences of {context.plan.max_sequence_tokens} tokens are too short for it")
    rng = random.Random(f"{name} {context.plan.seed}")
    tokens = random_tokens(context.stack, rng, length)
    return GenerateRequest(name, session, tokens, sampling, new_tokens, stops, seed=rng.randrange(1 << 30))


def _asked(context: Context, requests: list[GenerateRequest], *, keep: bool = False) -> list[GenerateResult]:
    """Their results. Raises EngineError if one is refused."""
    results = []
    try:
        results = context.stack.engine.generate(requests)
    finally:
        if not (keep and results):
            context.stack.engine.end_sessions([each.session_id for each in requests if each.session_id])
    for result in results:
        if result.finish_reason == "error" or not result.token_ids:
            raise EngineError(f"generate: {result.error or 'no token was drawn'} (request {result.request_id})")
    return results


def _largest_gap(a: GenerateResult, b: GenerateResult) -> float:
    """Of the tokens up to the first that differs, the largest difference of log-probs."""
    first, again = ([value for span in each.spans for value in span.logprobs] for each in (a, b))
    largest = 0.0
    for one, other, x, y in zip(a.token_ids, b.token_ids, first, again, strict=False):
        if one != other:
            break
        largest = max(largest, abs(x - y))
    return largest


def _against_score(context: Context, request: GenerateRequest, result: GenerateResult) -> np.ndarray:
    """Absolute differences `[n]` of what was reported with the draw and by `score`."""
    scores = context.stack.engine.score([(*request.token_ids, *result.token_ids)])[0].logprobs
    drawn = np.array([value for span in result.spans for value in span.logprobs])
    start = len(request.token_ids) - 1
    found: np.ndarray = np.abs(drawn - np.asarray(scores[start : start + len(drawn)]))
    return found
