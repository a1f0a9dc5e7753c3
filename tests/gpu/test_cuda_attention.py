"""Sink attention on a card against its dense float64 twin: values, all gradients, ragged, windowed, grouped."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from keel.ops.attention import (
    Span,
    attend_cache,
    build_layout,
    choose_backend,
    dense_attention,
    layout_attention,
    packed_layout,
    usable_backends,
)

pytestmark = pytest.mark.gpu

RAGGED = (5, 70, 33, 1, 16, 300, 64, 2)
PACKED = torch.tensor([0, *RAGGED]).cumsum(0)
SHAPES = [(8, 2, 64), (6, 6, 32), (16, 8, 128)]  # query heads, key heads, head size
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def inputs(device, dtype, shape, num_queries, num_keys):
    heads, kv_heads, size = shape
    draw = torch.Generator().manual_seed(3)
    sizes = [(num_queries, heads, size), (num_keys, kv_heads, size), (num_keys, kv_heads, size), (heads,)]
    made = [torch.randn(each, generator=draw).to(dtype) for each in sizes]
    made[3] = torch.linspace(-4, 4, heads).to(dtype)
    return [tensor.to(device).requires_grad_() for tensor in made]


def values_and_gradients(given, layout, backend="auto"):
    out = layout_attention(*given, layout=layout, scale=0.125, backend=backend)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, given, weight.to(out.device, out.dtype))]


def twin(given, layout):
    """The dense reference in float64 on the CPU, of inputs and a gradient rounded as the card's."""
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in given]
    out, _ = dense_attention(*exact, layout, 0.125)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(given[0].dtype).double()
    return [out.detach(), *torch.autograd.grad(out, exact, weight)]


def assert_close(got, want, dtype):
    for name, mine, exact in zip(("out", "dq", "dk", "dv", "ds"), got, want, strict=True):
        assert mine.dtype == dtype, name
        gap = (mine.cpu().double() - exact).abs().max()
        assert gap < TOLERANCE[dtype] * exact.abs().max(), (name, float(gap), float(exact.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 1, 7, 32, 128, 1000])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packed_sequences(card, dtype, window, shape):
    layout = packed_layout(PACKED, window)
    given = inputs(card, dtype, shape, sum(RAGGED), sum(RAGGED))
    expected = "blocks" if dtype == torch.float32 else "cuda"
    assert choose_backend("auto", card, dtype).name == expected
    assert_close(values_and_gradients(given, layout), twin(given, layout), dtype)


@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kernel_that_is_installed(card, dtype, window):
    """cuDNN and flex come with torch; the flash packages where there are any, version 4 with its own sinks."""
    layout = packed_layout(PACKED, window)
    given = inputs(card, dtype, SHAPES[0], sum(RAGGED), sum(RAGGED))
    names = [backend.name for backend in usable_backends(card, dtype, SHAPES[0][2])]
    assert {"cuda", "cudnn", "flex"} <= set(names)
    if window is not None:
        names.remove("cudnn")
    if find_spec("flash_attn") is not None and find_spec("flash_attn.cute") is not None:
        names.append("flash_attn_4")
    want = twin(given, layout)
    for name in names:
        assert_close(values_and_gradients(given, layout, name), want, dtype)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_spans_with_a_cache_with_padding_and_with_rows_that_see_nothing(card, dtype, window):
    spans = (Span(3, 17, 0, 50, 30), Span(20, 12, 50, 30, -4), Span(32, 4, 80, 0, 0))
    layout = build_layout(spans, window, 40, 90)
    given = inputs(card, dtype, SHAPES[0], 40, 90)
    got = values_and_gradients(given, layout)
    assert_close(got, twin(given, layout), dtype)
    assert (got[0][:3] == 0).all()
    assert (got[0][36:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 32])
def test_same_inputs_same_bits_with_and_without_gradient(card, dtype, window):
    lengths = torch.tensor([0, 1500, 700, 40]).cumsum(0)
    layout = packed_layout(lengths, window)
    given = inputs(card, dtype, SHAPES[2], 2240, 2240)
    first, second = values_and_gradients(given, layout), values_and_gradients(given, layout)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with torch.no_grad():
        assert torch.equal(layout_attention(*given, layout=layout, scale=0.125), first[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 32])
def test_a_sequence_has_the_same_bits_whatever_is_packed_beside_it(card, dtype, window):
    given = inputs(card, dtype, SHAPES[0], sum(RAGGED), sum(RAGGED))
    with torch.no_grad():
        packed = layout_attention(*given, layout=packed_layout(PACKED, window), scale=0.125)
        for start, length in zip(PACKED.tolist(), RAGGED, strict=False):
            rows = [tensor[start : start + length] for tensor in given[:3]]
            layout = packed_layout(torch.tensor([0, length]), window)
            alone = layout_attention(*rows, given[3], layout=layout, scale=0.125)
            assert torch.equal(alone, packed[start : start + length]), length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 7])
def test_decoding_on_the_card_is_decoding_on_the_cpu(card, dtype, window):
    heads, kv_heads, size = SHAPES[0]
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(4, 3, heads, size, generator=draw).to(dtype)
    caches = [torch.randn(4, kv_heads, 96, size, generator=draw).to(dtype) for _ in range(2)]
    positions = torch.tensor([[4, 5, 6], [40, 41, 42], [93, 94, 95], [12, -1, -1]])
    sinks = torch.linspace(-4, 4, heads)
    given = {"positions": positions, "sinks": sinks}
    on_cpu = attend_cache(q, *caches, **given, scale=0.125, window=window)
    moved = {name: tensor.to(card) for name, tensor in given.items()}
    on_card = attend_cache(q.to(card), *(cache.to(card) for cache in caches), **moved, scale=0.125, window=window)
    assert (on_card.cpu().double() - on_cpu.double()).abs().max() < TOLERANCE[dtype] * on_cpu.abs().max()
    assert (on_card[3, 1:] == 0).all()
