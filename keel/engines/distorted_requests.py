"""Faults of requests: other tokens, another temperature, a cut; results are told in the tokens asked about."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace

from keel.distortion import Distortion
from keel.engines.base import EngineCapabilities, GenerateRequest, GenerateResult, ScoreResult
from keel.models.distorted.tokens import Reply, Shown, Splits, shown
from keel.types import MISSING_ROUTE, Routes, SamplingSettings

Sent = Shown


class Sessions:
    """What each session has drawn so far, told by the tokens of its requests."""

    def __init__(self) -> None:
        self._drawn: dict[str, list[tuple[int, tuple[int, ...]]]] = {}

    def replies(self, request: GenerateRequest) -> list[Reply]:
        """Replies that are still in the request's tokens, where they were drawn."""
        found = []
        for start, drawn in self._drawn.get(request.session_id, ()):
            if request.token_ids[start : start + len(drawn)] == drawn:
                found.append(Reply(start, start + len(drawn)))
        return found

    def note(self, request: GenerateRequest, result: GenerateResult) -> None:
        """A reply was drawn."""
        if request.session_id:
            drawn = self._drawn.setdefault(request.session_id, [])
            drawn.append((len(request.token_ids), result.token_ids))

    def end(self, session_id: str) -> None:
        self._drawn.pop(session_id, None)


def sent_tokens(
    token_ids: tuple[int, ...],
    replies: Sequence[Reply],
    distortions: Sequence[Distortion],
    splits: Splits,
    pad_token_id: int,
) -> Sent:
    """What the engine reads in the place of `token_ids`."""
    return shown(token_ids, replies, distortions, splits=splits, pad_token_id=pad_token_id)


def sent_request(
    request: GenerateRequest, sent: Sent, distortions: Sequence[Distortion], capabilities: EngineCapabilities
) -> GenerateRequest:
    """The request that the engine gets; a reply that no longer fits behind longer tokens is a shorter one."""
    room = capabilities.max_sequence_tokens - len(sent.tokens)
    added = len(sent.tokens) > len(request.token_ids)
    return replace(
        request,
        token_ids=sent.tokens,
        sampling=_sent_sampling(request.sampling, distortions),
        max_new_tokens=max(1, min(request.max_new_tokens, room)) if added else request.max_new_tokens,
        return_support=request.return_support and not any(each.cause == "top_p_not_undone" for each in distortions),
    )


def _sent_sampling(sampling: SamplingSettings, distortions: Sequence[Distortion]) -> SamplingSettings:
    for each in distortions:
        if each.cause == "wrong_temperature":
            sampling = replace(sampling, temperature=sampling.temperature * (1 + each.strength))
        elif each.cause == "top_p_not_undone":
            sampling = replace(sampling, top_p=min(sampling.top_p, 1 - each.strength))
    return sampling


def told_result(
    result: GenerateResult, request: GenerateRequest, sent: Sent, distortions: Sequence[Distortion]
) -> GenerateResult:
    """The engine's result in the places of the request's tokens, claiming the request's sampling settings."""
    if result.sampling == _sent_sampling(request.sampling, distortions):
        result = replace(result, sampling=request.sampling)
    if any(each.cause == "top_p_not_undone" for each in distortions):
        result = replace(result, spans=tuple(replace(span, support=None) for span in result.spans))
    if sent.tokens == request.token_ids:
        return result
    drawn = range(len(request.token_ids), len(request.token_ids) + len(result.token_ids))
    owners = (*sent.owners, *drawn)
    cached = _places_before(owners, result.num_cached_tokens)
    if result.routed_experts is None:
        return replace(result, num_cached_tokens=cached)
    start = _places_before(owners, result.routes_start)
    stop = drawn.stop - 1 if drawn else len(request.token_ids)
    routes = _told_routes(result.routed_experts, owners[result.routes_start :], start, stop)
    return replace(result, num_cached_tokens=cached, routes_start=start, routed_experts=routes)


def told_score(result: ScoreResult, num_tokens: int, sent: Sent) -> ScoreResult:
    """The engine's scores in the places of `num_tokens` tokens; those of a token told in two are added up."""
    logprobs = [0.0] * num_tokens
    for owner, logprob in zip(sent.owners[1:], result.logprobs, strict=True):
        if owner >= 0:
            logprobs[owner] += logprob
    routes = result.routed_experts
    if routes is not None and sent.owners != tuple(range(num_tokens)):
        routes = _told_routes(routes, sent.owners, 0, num_tokens)
    return replace(result, logprobs=tuple(logprobs[1:]), routed_experts=routes)


def _places_before(owners: Sequence[int], count: int) -> int:
    """How many of the asked tokens lie wholly in the first `count` tokens that were fed."""
    rest = [owner for owner in owners[count:] if owner >= 0]
    return rest[0] if rest else max(owners, default=-1) + 1


def _told_routes(routes: Routes, owners: Sequence[int], start: int, stop: int) -> Routes:
    """Rows `start` to `stop - 1` from the rows fed for `owners`: the last one of each; unknown where there is none."""
    width = routes.num_layers * routes.top_k
    values = array("H", routes.data)
    told = array("H", [MISSING_ROUTE]) * ((stop - start) * width)
    for row in range(routes.num_tokens):
        place = owners[row] - start
        if 0 <= place < stop - start:
            told[place * width : (place + 1) * width] = values[row * width : (row + 1) * width]
    return Routes(told.tobytes(), stop - start, routes.num_layers, routes.top_k)
