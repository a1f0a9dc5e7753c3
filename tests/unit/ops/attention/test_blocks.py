"""Attention by plain products, on any device, against the dense twin and the stock kernel."""

from __future__ import annotations

import pytest
import torch

from keel.ops.attention import (
    Span,
    attend_cache,
    build_layout,
    decode,
    dense_attention,
    layout_attention,
    packed_layout,
)
from keel.ops.attention import blocks as blocks_backend

HEADS, KV_HEADS, SIZE, SCALE = 6, 2, 10, 0.29
RAGGED = (5, 70, 33, 1, 16, 300)
PACKED = torch.tensor([0, *RAGGED]).cumsum(0)
PARTS = {  # (query_start, num_queries, key_start, num_keys, offset) of spans over 40 queries and 90 keys
    "cache": ((0, 20, 0, 50, 30), (20, 20, 50, 40, 20)),
    "ring": ((0, 20, 0, 30, -5), (20, 20, 30, 8, 10)),
    "shared keys": ((0, 20, 0, 50, 30), (25, 15, 10, 50, 20)),
    "nothing seen": ((0, 20, 0, 50, -20), (20, 20, 0, 0, 0)),
}


def leaves(num_queries: int, num_keys: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = ((num_queries, HEADS, SIZE), (num_keys, KV_HEADS, SIZE), (num_keys, KV_HEADS, SIZE), (HEADS,))
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def values_and_gradients(layout, given, backend):
    out = layout_attention(*given, layout=layout, scale=SCALE, backend=backend)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, given, weight)]


def layouts():
    for window in (None, 1, 7, 32, 200):
        yield f"packed {window}", packed_layout(PACKED, window)
        for name, spans in PARTS.items():
            yield f"{name} {window}", build_layout(tuple(Span(*span) for span in spans), window, 40, 90)


@pytest.mark.parametrize("layout", [pytest.param(layout, id=name) for name, layout in layouts()])
def test_values_and_gradients_are_the_dense_twins(layout):
    given = leaves(layout.num_query_rows, layout.num_key_rows)
    pairs = zip(
        values_and_gradients(layout, given, "blocks"), values_and_gradients(layout, given, "reference"), strict=True
    )
    for name, (got, want) in zip(("out", "dq", "dk", "dv", "ds"), pairs, strict=True):
        assert (got - want).abs().max() < 1e-12, name


@pytest.mark.parametrize("layout", [pytest.param(layout, id=name) for name, layout in layouts()])
def test_a_row_that_sees_nothing_is_zero_and_minus_infinity(layout):
    q, k, v, _ = (leaf.detach() for leaf in leaves(layout.num_query_rows, layout.num_key_rows))
    out, lse = blocks_backend.forward(q, k, v, layout, SCALE)
    _, twin_lse = dense_attention(q, k, v, None, layout, SCALE)
    unseen = twin_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), unseen)
    assert (out[unseen] == 0).all()
    assert (lse - twin_lse)[~unseen].abs().max() < 1e-12 if bool((~unseen).any()) else True


@pytest.mark.parametrize("window", [None, 20])
def test_a_sequence_has_the_same_bits_whatever_is_packed_beside_it(window):
    given = leaves(sum(RAGGED), sum(RAGGED), torch.float32)
    packed = values_and_gradients(packed_layout(PACKED, window), given, "blocks")
    again = values_and_gradients(packed_layout(PACKED, window), given, "blocks")
    assert all(torch.equal(first, second) for first, second in zip(packed, again, strict=True))
    with torch.no_grad():
        for start, length in zip(PACKED.tolist(), RAGGED, strict=False):
            rows = [leaf[start : start + length] for leaf in given[:3]]
            layout = packed_layout(torch.tensor([0, length]), window)
            alone = layout_attention(*rows, given[3], layout=layout, scale=SCALE, backend="blocks")
            assert torch.equal(alone, packed[0][start : start + length])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7])
def test_decoding_by_plain_products_is_decoding_by_the_kernel(monkeypatch, dtype, window):
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(5, 3, HEADS, SIZE, generator=draw).to(dtype)
    cache = [torch.randn(5, KV_HEADS, 96, SIZE, generator=draw).to(dtype) for _ in range(2)]
    positions = torch.tensor([[4, 5, 6], [40, 41, 42], [0, 1, 2], [93, 94, 95], [12, -1, -1]])
    sinks = torch.randn(HEADS, generator=draw)
    kernel = attend_cache(q, *cache, positions=positions, sinks=sinks, scale=SCALE, window=window)
    monkeypatch.setattr(
        decode, "_kernel", lambda *given, attn_mask, scale: decode.plain_products(*given[:3], attn_mask, scale)
    )
    whole = attend_cache(q, *cache, positions=positions, sinks=sinks, scale=SCALE, window=window)
    monkeypatch.setattr(
        decode, "WIDE_BYTES", 2 * 2 * KV_HEADS * 96 * SIZE * max(4, q.itemsize)
    )  # two elements at a time
    parts = attend_cache(q, *cache, positions=positions, sinks=sinks, scale=SCALE, window=window)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (whole - kernel).abs().max() < tolerance
    assert torch.equal(whole, parts)
    assert (parts[4, 1:] == 0).all()
