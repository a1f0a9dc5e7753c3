"""The engine's protocol: what may sample for Keel, in this process or another.

Requests and results are plain values that pickle and turn into JSON; nothing in them refers to a module, a
tensor or a process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from keel.engines.identity import ModelIdentity
from keel.sync.base import WeightSource
from keel.types import Fault, FinishReason, Routes, SamplingSettings, Support

__all__ = [
    "DrawnSpan",
    "Engine",
    "EngineCapabilities",
    "EngineError",
    "EngineHealth",
    "GenerateRequest",
    "GenerateResult",
    "ScoreResult",
    "WeightSource",
]


class EngineError(Fault, RuntimeError):
    """The engine failed; the episode that asked becomes `engine_error`, never a reward of zero."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Continue `token_ids` (the whole sequence so far) by at most `max_new_tokens`.

    `session_id` names an episode: the engine keeps the session's key-value prefix until `end_session`.
    `seed` decides every draw: token number i of a sequence is drawn with a uniform number made of (seed, i) alone.
    Generation ends after a token of `stop_token_ids` (it is part of the result), or at `max_new_tokens`.

    An empty `session_id` keeps nothing. `len(token_ids) + max_new_tokens` must fit the engine's `max_sequence_tokens`:
    a request that does not fit (or is impossible otherwise) is answered with finish reason "error" and a message.
    """

    request_id: str
    session_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingSettings
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int
    return_routes: bool = False
    return_support: bool = False


@dataclass(frozen=True, slots=True)
class DrawnSpan:
    """Tokens drawn under one set of weights."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_version: int
    support: Support | None = None


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """What was drawn. More than one span if weights changed on the way.

    `routed_experts` covers positions `routes_start` to `routes_start + rows - 1` of prompt + drawn tokens: all that
    were fed for this request (the last drawn token was not). `sampling` is what the engine really did.

    `num_cached_tokens` is how much of the prompt the session still held from its last request, or was made to hold
    again (then also `routes_start`). What was copied from a session with the same beginning counts as fed: its routes
    are here.
    A token fed again because weights changed on the way keeps the routes with which the next token was drawn.
    """

    request_id: str
    spans: tuple[DrawnSpan, ...]
    finish_reason: FinishReason
    sampling: SamplingSettings
    num_cached_tokens: int = 0
    routes_start: int = 0
    routed_experts: Routes | None = None
    error: str | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for span in self.spans for token in span.token_ids)


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """`logprobs[i]` is the log-prob of `token_ids[i + 1]` given what precedes it, at temperature 1; n - 1 of them."""

    logprobs: tuple[float, ...]
    routed_experts: Routes | None
    policy_version: int


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """What the engine can do, so that a config asking for more is refused before the run.

    `identity` is that of the model it runs, None if it does not tell: another than the learner's is refused.
    `cache_bytes` is what its keys and values take while it samples, 0 if it does not tell. `weight_receivers` is how
    many processes take part in a broadcast of weights; `weight_problem` is why it takes none, if so.
    """

    name: str
    max_sequence_tokens: int
    max_concurrency: int
    returns_routes: bool
    keeps_prefix: bool
    shares_weights: bool
    weight_sources: tuple[str, ...]
    deterministic: bool
    cache_bytes: int = 0
    returns_support: bool = False
    identity: ModelIdentity | None = None
    weight_receivers: int = 1
    weight_problem: str = ""


@dataclass(frozen=True, slots=True)
class EngineHealth:
    ok: bool
    policy_version: int
    running: int
    waiting: int
    detail: str = ""


class Engine(Protocol):
    """Who samples. Cancelling `generate` aborts the request and frees what it held, its session included.

    A session runs one request at a time. `end_session` of a session that is still generating ends that request with
    finish reason "abort"; ending an unknown session does nothing. While paused nothing is drawn; requests are taken.
    `load_weights` may come at any time: tokens drawn before and after it are in different spans.
    `release_memory` gives back what the next request can take again (keys and values), for a learner on the same
    device; it raises EngineError while requests are under way.
    """

    async def generate(self, request: GenerateRequest) -> GenerateResult: ...

    async def score(self, token_ids: tuple[int, ...]) -> ScoreResult: ...

    async def end_session(self, session_id: str) -> None: ...

    async def load_weights(self, source: WeightSource, version: int) -> None: ...

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def release_memory(self) -> None: ...

    def capabilities(self) -> EngineCapabilities: ...

    async def health(self) -> EngineHealth: ...

    async def close(self) -> None: ...
