"""The token half of an episode while it grows: what the engine saw and drew, span by span, with its routes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from keel.chat.base import Prompt
from keel.engines.base import GenerateResult
from keel.types import Routes, Segment, TokenSpan


class TokenRecordError(RuntimeError):
    """Chat or engine broke token in, token out: a fault of the program, never of the environment or the policy."""


class TokenRecord:
    """Segments that grow: `feed` a prompt, `draw` a result, and so on; `segments()` at the end.

    Routes arrive late: the last token drawn in one turn is first fed in the next. Each position keeps the first routes
    it was given, the ones behind the log-probs drawn after it; a later prefill of the same tokens may route otherwise.
    """

    def __init__(self) -> None:
        self._done: list[Segment] = []
        self._open: _OpenSegment | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens of the open segment: what the engine has seen."""
        return () if self._open is None else tuple(self._open.token_ids)

    @property
    def place(self) -> tuple[int, int]:
        """Where the next span will stand: index of its segment, and its own index in it."""
        return len(self._done), 0 if self._open is None else len(self._open.cuts)

    def feed(self, prompt: Prompt) -> None:
        """Record a prompt: its tail is new context, or all of it if it starts a new segment.

        Raises TokenRecordError if it claims to extend what the engine saw, and does not.
        """
        if not prompt.extends or self._open is None:
            self._close()
            self._open = _OpenSegment()
        seen = self._open.token_ids
        if list(prompt.token_ids[: len(seen)]) != seen:
            raise TokenRecordError(
                "the chat says its prompt extends the tokens so far, but it does not begin with them; a chat that "
                "renders earlier turns anew must return extends=False"
            )
        self._open.append(TokenSpan(prompt.token_ids[len(seen) :], "context"))

    def draw(self, result: GenerateResult) -> None:
        """Record what the engine drew after the last prompt. Raises TokenRecordError if its routes do not fit."""
        if self._open is None:
            raise TokenRecordError("tokens were drawn before any prompt was fed")
        for span in result.spans:
            drawn = (span.logprobs, span.policy_version, result.sampling)
            self._open.append(TokenSpan(span.token_ids, "policy", *drawn, support=span.support))
        if result.routed_experts is not None:
            self._open.add_routes(result.routes_start, result.routed_experts)

    def demonstrate(self, token_ids: Sequence[int]) -> None:
        """Record tokens that a demonstration puts in the policy's place."""
        if self._open is None:
            raise TokenRecordError("tokens were demonstrated before any prompt was fed")
        self._open.append(TokenSpan(tuple(token_ids), "demonstration"))

    def segments(self) -> tuple[Segment, ...]:
        """All segments; the record is closed by this."""
        self._close()
        return tuple(self._done)

    def _close(self) -> None:
        if self._open is not None:
            self._done.append(self._open.close())
            self._open = None


class _OpenSegment:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.cuts: list[TokenSpan] = []  # spans so far, without routes
        self._row: Routes | None = None  # one row of no known route: the shape of all of them
        self._routes = bytearray()  # of positions 0 to the last that was given any

    def append(self, span: TokenSpan) -> None:
        """The next tokens; of none, no span is made."""
        if span.token_ids:
            self.token_ids.extend(span.token_ids)
            self.cuts.append(span)

    def add_routes(self, start: int, routes: Routes) -> None:
        end = start + routes.num_tokens
        if start < 0 or end > len(self.token_ids):
            raise TokenRecordError(
                f"the engine gave routes for positions {start} to {end - 1} of {len(self.token_ids)} tokens"
            )
        if self._row is None:
            self._row = Routes.missing(1, routes.num_layers, routes.top_k)
        elif (routes.num_layers, routes.top_k) != (self._row.num_layers, self._row.top_k):
            raise TokenRecordError(f"the engine gave routes of shape {routes.shape} after {self._row.shape}")
        known = len(self._routes) // routes.row_bytes
        if known < start:
            self._routes += self._row.data * (start - known)
        if known < end:
            self._routes += routes.data[max(0, known - start) * routes.row_bytes :]

    def close(self) -> Segment:
        if self._row is None:
            return Segment(tuple(self.cuts))
        layers, top_k, size = self._row.num_layers, self._row.top_k, self._row.row_bytes
        data = bytes(self._routes) + self._row.data * (len(self.token_ids) - len(self._routes) // size)
        spans = []
        start = 0
        for cut in self.cuts:
            end = start + len(cut)
            routes = Routes(data[start * size : end * size], len(cut), layers, top_k)
            spans.append(replace(cut, routed_experts=routes))
            start = end
        return Segment(tuple(spans))
