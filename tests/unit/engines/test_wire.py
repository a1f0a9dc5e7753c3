"""JSON and back: nothing is lost, and what is no request or result says so."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel.engines.base import DrawnSpan, GenerateRequest, GenerateResult, ScoreResult
from keel.engines.wire import WireError, from_json, to_json
from keel.types import Routes, SamplingSettings

tokens = st.lists(st.integers(0, 200_000), max_size=9).map(tuple)
logprobs = st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=9).map(tuple)
sampling = st.builds(SamplingSettings, st.floats(0, 2), st.floats(0.1, 1), st.integers(0, 50))
routes = st.none() | st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 2)).flatmap(
    lambda shape: st.binary(
        min_size=2 * shape[0] * shape[1] * shape[2], max_size=2 * shape[0] * shape[1] * shape[2]
    ).map(lambda data: Routes(data, *shape))
)
values = st.one_of(
    st.builds(
        GenerateRequest,
        st.text(),
        st.text(),
        tokens,
        sampling,
        st.integers(1, 99),
        tokens,
        st.integers(),
        st.booleans(),
    ),
    st.builds(
        GenerateResult,
        st.text(),
        st.lists(st.builds(DrawnSpan, tokens, logprobs, st.integers(0, 9)), max_size=3).map(tuple),
        st.sampled_from(["stop", "length", "abort", "error"]),
        sampling,
        st.integers(0, 99),
        st.integers(0, 99),
        routes,
        st.none() | st.text(),
    ),
    st.builds(ScoreResult, logprobs, routes, st.integers(0, 9)),
)


@given(values)
def test_nothing_is_lost_on_the_way(value: GenerateRequest | GenerateResult | ScoreResult) -> None:
    assert from_json(to_json(value)) == value
    assert pickle.loads(pickle.dumps(value)) == value
    assert "\n" not in to_json(value)


def test_routes_travel_little_endian() -> None:
    result = ScoreResult((), Routes(b"\x01\x00\x02\x00", 1, 1, 2), 0)
    assert '"AQACAA=="' in to_json(result)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind":"Engine"}', '{"kind":"ScoreResult"}', "null", '{"kind":[]}'])
def test_anything_else_is_an_error_that_shows_it(text: str) -> None:
    with pytest.raises(WireError, match="to_json"):
        from_json(text)


def test_a_log_prob_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="float"):
        to_json(ScoreResult((float("-inf"),), None, 0))
