"""Layouts: every visible pair exactly once, linear cost, one object per micro-batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.ops.attention import Layout, Span, build_layout, packed_layout


def visible_pairs(layout: Layout) -> dict[tuple[int, int], int]:
    """How often each (query row, key row) is computed by a real row of some bucket."""
    pairs: dict[tuple[int, int], int] = {}
    for bucket in layout.buckets:
        queries = bucket.query_index.view(bucket.num_pieces, -1)
        keys = bucket.key_index.view(bucket.num_pieces, -1)
        mask = bucket.mask(torch.float64)
        seen = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool) if mask is None else mask == 0
        if bucket.causal:
            seen = seen.tril()
        padding = torch.zeros_like(queries, dtype=torch.bool)
        if bucket.padded_queries is not None:
            padding = bucket.padded_queries.view_as(queries)
        for piece in range(bucket.num_pieces):
            for i, j in seen.nonzero().tolist():
                if not padding[piece, i]:
                    pair = (int(queries[piece, i]), int(keys[piece, j]))
                    pairs[pair] = pairs.get(pair, 0) + 1
    return pairs


def wanted_pairs(layout: Layout) -> dict[tuple[int, int], int]:
    window = layout.window if layout.window is not None else 10**9
    return {
        (span.query_start + i, span.key_start + j): 1
        for span in layout.spans
        for i in range(span.num_queries)
        for j in range(span.num_keys)
        if 0 <= span.offset + i - j < window
    }


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 170), min_size=1, max_size=3),
    window=st.one_of(st.none(), st.integers(1, 80)),
)
def test_packed_sequences_compute_each_visible_pair_once(lengths: list[int], window: int | None) -> None:
    layout = packed_layout(torch.tensor([0, *lengths]).cumsum(0), window)
    assert visible_pairs(layout) == wanted_pairs(layout)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_queries=st.integers(0, 60),
    num_keys=st.integers(0, 60),
    offset=st.integers(-40, 80),
    window=st.one_of(st.none(), st.integers(1, 50)),
)
def test_any_span_computes_each_visible_pair_once(
    num_queries: int, num_keys: int, offset: int, window: int | None
) -> None:
    span = Span(2, num_queries, 3, num_keys, offset)
    layout = build_layout((span,), window, num_queries + 5, num_keys + 5)
    assert visible_pairs(layout) == wanted_pairs(layout)


@pytest.mark.parametrize("window", [1, 32, 128, 600, 3000])
def test_a_window_costs_tokens_times_window_and_holds_no_square_mask(window: int) -> None:
    def cost(length: int) -> int:
        layout = packed_layout(torch.tensor([0, length]), window)
        total = 0
        for bucket in layout.buckets:
            rows, columns = len(bucket.query_index) // bucket.num_pieces, len(bucket.key_index) // bucket.num_pieces
            total += bucket.num_pieces * rows * columns
            if bucket.mask(torch.float32) is not None:
                assert rows <= 1024
                assert columns <= 2 * (window + 512)
        return total

    length = 16_384
    assert cost(length) <= 3 * length * max(window, 128)
    assert cost(2 * length) < 2.2 * cost(length)


def test_short_sequences_of_one_size_are_one_kernel_call() -> None:
    for window in (None, 32):
        lengths = torch.randint(65, 81, (256,), generator=torch.Generator().manual_seed(0))
        assert len(packed_layout(torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(), window).buckets) == 1


def test_layers_share_one_layout() -> None:
    first = packed_layout(torch.tensor([0, 4, 9], dtype=torch.int32), 3)
    assert packed_layout(torch.tensor([0, 4, 9], dtype=torch.int64), 3) is first
    assert packed_layout(torch.tensor([0, 4, 9], dtype=torch.int32), 4) is not first


def test_a_changed_cu_seqlens_is_another_layout() -> None:
    cu_seqlens = torch.tensor([0, 4, 9])
    first = packed_layout(cu_seqlens, None)
    cu_seqlens[1] = 5
    assert packed_layout(cu_seqlens, None).spans != first.spans


def test_spans_that_leave_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="leaves the 4 query rows"):
        build_layout((Span(2, 3, 0, 4),), None, 4, 4)
    with pytest.raises(ValueError, match="leaves"):
        build_layout((Span(0, 3, -1, 4),), None, 4, 4)
