"""The token half of an episode: refusals, and routes that arrive in pieces."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from keel.chat.base import Prompt
from keel.engines.base import DrawnSpan, GenerateResult
from keel.rollouts.tokens import TokenRecord, TokenRecordError
from keel.types import MISSING_ROUTE, Routes, SamplingSettings


def routes(*values: int, layers: int = 1) -> Routes:
    data = b"".join(value.to_bytes(2, sys.byteorder) for value in values)
    return Routes(data, len(values) // layers, layers, 1)


def drawn(count: int, **changes: Any) -> GenerateResult:
    spans = (DrawnSpan(tuple(range(count)), (-1.0,) * count, 0),) if count else ()
    return GenerateResult("r", spans, "stop", SamplingSettings(), **changes)


def values(record: TokenRecord) -> list[int]:
    found = b"".join(span.routed_experts.data for span in record.segments()[0] if span.routed_experts is not None)
    return [int.from_bytes(found[i : i + 2], sys.byteorder) for i in range(0, len(found), 2)]


def test_pieces_that_overlap_keep_the_first_and_gaps_stay_unknown() -> None:
    record = TokenRecord()
    record.feed(Prompt((1, 2, 3, 4), extends=False))
    record.draw(drawn(2, routes_start=2, routed_experts=routes(12, 13, 14)))
    record.feed(Prompt((1, 2, 3, 4, 0, 1, 9), extends=True))
    record.draw(drawn(1, routes_start=0, routed_experts=routes(20, 21, 22, 23, 24, 25, 26)))
    assert values(record) == [MISSING_ROUTE, MISSING_ROUTE, 12, 13, 14, 25, 26, MISSING_ROUTE]


def test_a_later_result_without_routes_leaves_them_unknown() -> None:
    record = TokenRecord()
    record.feed(Prompt((1, 2), extends=False))
    record.draw(drawn(1, routed_experts=routes(5, 6)))
    record.feed(Prompt((1, 2, 0, 7), extends=True))
    record.draw(drawn(1))
    assert values(record) == [5, 6, *[MISSING_ROUTE] * 3]


def test_routes_of_an_engine_that_gives_none_are_absent() -> None:
    record = TokenRecord()
    record.feed(Prompt((1, 2), extends=False))
    record.draw(drawn(1))
    assert [span.routed_experts for span in record.segments()[0]] == [None, None]


@pytest.mark.parametrize(
    ("start", "given", "mentions"),
    [(1, routes(1, 2, 3), "positions 1 to 3"), (0, routes(1, 2, layers=2), "shape")],
)
def test_routes_that_do_not_fit_are_refused(start: int, given: Routes, mentions: str) -> None:
    record = TokenRecord()
    record.feed(Prompt((1, 2), extends=False))
    record.draw(drawn(1, routed_experts=routes(7)))
    with pytest.raises(TokenRecordError, match=mentions):
        record.draw(drawn(0, routes_start=start, routed_experts=given))


def test_an_empty_draw_leaves_no_span() -> None:
    record = TokenRecord()
    record.feed(Prompt((1, 2), extends=False))
    record.draw(drawn(0))
    assert record.place == (0, 1)
    assert [span.origin for span in record.segments()[0]] == ["context"]


def test_tokens_before_any_prompt_are_refused() -> None:
    with pytest.raises(TokenRecordError, match="before any prompt"):
        TokenRecord().draw(drawn(1))
    with pytest.raises(TokenRecordError, match="before any prompt"):
        TokenRecord().demonstrate((1,))


def test_a_first_prompt_starts_a_segment_whatever_it_says() -> None:
    record = TokenRecord()
    record.feed(Prompt((1, 2), extends=True))
    assert record.token_ids == (1, 2)
