"""Faults of what an engine reports: log-probs at the wrong token or rounded, a stop token that is not told."""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import replace

from keel.distortion import Distortion
from keel.engines.base import DrawnSpan, GenerateRequest, GenerateResult, ScoreResult
from keel.models.distorted.tokens import drawn_for, shift
from keel.types import Support

BFLOAT16_ROUNDING = 2.0**-9
"""Relative error of one rounding to bfloat16 (8 bits of mantissa), at most."""


def with_logprobs(result: GenerateResult, logprobs: Sequence[float]) -> GenerateResult:
    """The same tokens with other log-probs, one for each."""
    spans, done = list[DrawnSpan](), 0
    for span in result.spans:
        size = len(span.token_ids)
        spans.append(replace(span, logprobs=tuple(logprobs[done : done + size])))
        done += size
    return replace(result, spans=tuple(spans))


def distorted_result(result: GenerateResult, distortions: Sequence[Distortion]) -> GenerateResult:
    """`result` with its log-probs as a faulty engine reports them."""
    logprobs = [value for span in result.spans for value in span.logprobs]
    changed = distorted_logprobs(logprobs, result.token_ids, distortions)
    return result if changed == logprobs else with_logprobs(result, changed)


def distorted_score(result: ScoreResult, token_ids: Sequence[int], distortions: Sequence[Distortion]) -> ScoreResult:
    """`result` with its log-probs as a faulty engine reports them."""
    changed = distorted_logprobs(list(result.logprobs), token_ids, distortions)
    return replace(result, logprobs=tuple(changed))


def distorted_logprobs(
    logprobs: list[float], token_ids: Sequence[int], distortions: Sequence[Distortion]
) -> list[float]:
    """Log-probs shifted by whole places, and with noise of the size of a rounding, which the tokens decide."""
    for each in distortions:
        if each.cause == "shifted_logprobs" and logprobs:
            logprobs = shift(logprobs, int(each.strength))
        elif each.cause == "bfloat16_noise" and each.group == "logprobs":
            drawn = random.Random(f"{each.seed}/{zlib.crc32(array('q', token_ids).tobytes())}")
            size = each.strength * BFLOAT16_ROUNDING
            logprobs = [value * (1 + size * drawn.gauss(0.0, 1.0)) for value in logprobs]
    return logprobs


def without_stop(result: GenerateResult, request: GenerateRequest, distortion: Distortion) -> GenerateResult:
    """`result` without the stop token that ended it, if it is among the share that loses it and is not all of it."""
    tokens = result.token_ids
    stopped = result.finish_reason == "stop" and tokens and tokens[-1] in request.stop_token_ids
    if not stopped or len(tokens) < 2 or not drawn_for(distortion, tokens):
        return result
    last = result.spans[-1]
    kept = replace(
        last,
        token_ids=last.token_ids[:-1],
        logprobs=last.logprobs[:-1],
        support=None if last.support is None else _without_last(last.support),
    )
    spans = (*result.spans[:-1], kept) if kept.token_ids else result.spans[:-1]
    routes = result.routed_experts
    if routes is not None and routes.num_tokens:
        routes = routes.rows(0, routes.num_tokens - 1)  # the token now last was fed
    return replace(result, spans=spans, routed_experts=routes)


def _without_last(support: Support) -> Support:
    return replace(support, counts=support.counts[:-1], ids=support.ids[: 4 * sum(support.counts[:-1])])
