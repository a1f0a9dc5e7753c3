"""An engine that replays given replies, and a chat of readable tokens: whole implementations of their protocols."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from keel.chat.base import Prompt, Reply
from keel.engines.base import (
    DrawnSpan,
    EngineCapabilities,
    EngineError,
    EngineHealth,
    GenerateRequest,
    GenerateResult,
    ScoreResult,
    WeightSource,
)
from keel.types import FinishReason, Message, Routes, ToolSpec

STOP = 0  # ends a reply
NEXT = 1  # ends a message of context


def encode(text: str) -> tuple[int, ...]:
    """Characters are tokens."""
    return tuple(map(ord, text))


class LetterChat:
    """One character one token. A reply is "call:<text>", "final:<text>" or malformed.

    `forgetful` renders the conversation anew in every prompt, so that each turn starts a new segment.
    """

    def __init__(self, *, forgetful: bool = False) -> None:
        self.forgetful = forgetful

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return (STOP,)

    def start(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Prompt:
        return Prompt(self._render(messages), extends=False)

    def extend(
        self, token_ids: Sequence[int], history: Sequence[Message], new: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> Prompt:
        if self.forgetful:
            return Prompt(self._render([history[0], *new]), extends=False, dropped=("all but the first message",))
        return Prompt((*token_ids, *self._render(new)), extends=True)

    def demonstrate(self, message: Message, last: bool) -> tuple[int, ...]:
        return (*encode(("call:" if message.recipient else "final:") + message.content), *((STOP,) if last else ()))

    def parse(self, token_ids: Sequence[int]) -> Reply:
        if not token_ids or token_ids[-1] != STOP:
            return Reply((), "", "no end")
        text = "".join(map(chr, token_ids[:-1]))
        kind, colon, content = text.partition(":")
        if not colon or kind not in ("call", "final"):
            return Reply((), text, f"no kind in {text!r}")
        recipient = "functions.f" if kind == "call" else None
        return Reply((Message("assistant", content, channel="final", recipient=recipient),), text)

    @staticmethod
    def _render(messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(token for message in messages for token in (*encode(message.content), NEXT))


@dataclass
class ReplayEngine:
    """Answers with what `script(request)` says: a reply's text, an exception to raise, or a whole result.

    Log-probs are -0.5 - position / 1000, so that a shifted one is noticed; with `routes` the only expert choice of a
    position is the position itself plus 1000 times the number of the request, of one layer and one expert.
    """

    script: Callable[[GenerateRequest], str | Exception | GenerateResult]
    version: int = 7
    routes: bool = False
    max_sequence_tokens: int = 500
    max_concurrency: int = 8
    hold: asyncio.Event | None = None
    requests: list[GenerateRequest] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    cached: dict[str, int] = field(default_factory=dict)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        number = len(self.requests)
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(0)
            if self.hold is not None:
                await self.hold.wait()
            said = self.script(request)
        finally:
            self.running -= 1
        if isinstance(said, Exception):
            raise said
        return said if isinstance(said, GenerateResult) else self._result(request, said, number)

    def _result(self, request: GenerateRequest, text: str, number: int) -> GenerateResult:
        tokens = (*encode(text), STOP)
        reason: FinishReason = "stop"
        if len(tokens) > request.max_new_tokens:
            tokens, reason = tokens[: request.max_new_tokens], "length"
        start = len(request.token_ids)
        logprobs = tuple(-0.5 - (start + i) / 1000 for i in range(len(tokens)))
        cached = self.cached.get(request.session_id, 0)
        fed = start + len(tokens) - 1
        self.cached[request.session_id] = fed
        routes = None
        if self.routes:
            values = [position + 1000 * number for position in range(cached, fed)]
            routes = Routes(b"".join(v.to_bytes(2, "little") for v in values), len(values), 1, 1)
        spans = (DrawnSpan(tokens, logprobs, self.version),)
        return GenerateResult(request.request_id, spans, reason, request.sampling, cached, cached, routes)

    async def score(self, token_ids: tuple[int, ...]) -> ScoreResult:
        raise EngineError("a replay has no model to score with")

    async def end_session(self, session_id: str) -> None:
        self.ended.append(session_id)
        self.cached.pop(session_id, None)

    async def load_weights(self, source: WeightSource, version: int) -> None:
        self.version = version

    async def pause(self) -> None:
        return None

    async def resume(self) -> None:
        return None

    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(
            "replay", self.max_sequence_tokens, self.max_concurrency, self.routes, True, False, (), True
        )

    async def health(self) -> EngineHealth:
        return EngineHealth(True, self.version, self.running, 0)

    async def close(self) -> None:
        return None


@pytest.fixture
def letter_chat() -> type[LetterChat]:
    return LetterChat


@pytest.fixture
def replay_engine() -> type[ReplayEngine]:
    return ReplayEngine
