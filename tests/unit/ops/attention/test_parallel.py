"""The seams of context parallelism, all ranks in one process: rings of keys, split heads."""

from __future__ import annotations

import pytest
import torch

from keel.ops.attention import (
    Span,
    apply_sinks,
    choose_backend,
    dense_attention,
    merge_parts,
    packed_layout,
    part_layout,
    sink_attention,
    sinks_gradient,
    split_heads,
)

HEADS, KV_HEADS, SIZE, SCALE = 4, 2, 8, 0.3
BOUNDS = torch.tensor([0, 30, 31, 90, 96])
STRETCHES = [(0, 24), (24, 48), (48, 72), (72, 96)]
LARGE = torch.tensor([-20.0, 0.0, 3.0, 20.0], dtype=torch.float64)
"""Sinks this far apart show one that is dropped, or added once per part."""


def inputs(dtype=torch.float64):
    draw = torch.Generator().manual_seed(4)
    q = torch.randn(96, HEADS, SIZE, generator=draw, dtype=torch.float64).to(dtype)
    k, v = (torch.randn(96, KV_HEADS, SIZE, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
    grad = torch.randn(96, HEADS, SIZE, generator=draw, dtype=torch.float64).to(dtype)
    return q, k, v, grad


def ring(q, k, v, sinks, grad, window):
    """Every rank's turn around the ring, forward and backward."""
    backend = choose_backend("auto", q.device, q.dtype)
    outs, dq, dk, dv, ds = [], torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.zeros_like(sinks)
    for own in STRETCHES:
        mine = slice(*own)
        layouts = [part_layout(BOUNDS, window, own, keys) for keys in STRETCHES]
        parts = [
            backend.forward(q[mine], k[slice(*keys)], v[slice(*keys)], layout, SCALE)
            for keys, layout in zip(STRETCHES, layouts, strict=True)
        ]
        out, lse = apply_sinks(*merge_parts(parts), sinks)
        outs.append(out)
        ds += sinks_gradient(grad[mine], out, lse, sinks)
        for keys, layout in zip(STRETCHES, layouts, strict=True):
            theirs = slice(*keys)
            given = (grad[mine], q[mine], k[theirs], v[theirs], out, lse)
            for total, part in zip(
                (dq[mine], dk[theirs], dv[theirs]), backend.backward(*given, layout, SCALE), strict=True
            ):
                total += part
    return torch.cat(outs), dq, dk, dv, ds


@pytest.mark.parametrize("window", [None, 1, 7, 24, 40])
def test_a_ring_is_the_whole_in_values_and_all_gradients(window):
    q, k, v, grad = inputs()
    got = ring(q, k, v, LARGE, grad, window)
    leaves = [each.clone().requires_grad_() for each in (q, k, v, LARGE)]
    out, _ = dense_attention(*leaves, packed_layout(BOUNDS, window), SCALE)
    want = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    for name, mine, twin in zip(("out", "dq", "dk", "dv", "ds"), got, want, strict=True):
        assert (mine - twin).abs().max() < 1e-12 * max(1.0, float(twin.abs().max())), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_ring_in_lower_precision_keeps_its_type_and_stays_close(dtype):
    q, k, v, grad = inputs(dtype)
    got = ring(q, k, v, LARGE.to(dtype), grad, 24)[0]
    twin, _ = dense_attention(q, k, v, LARGE.to(dtype), packed_layout(BOUNDS, 24), SCALE)
    assert got.dtype == dtype
    assert (got.double() - twin).abs().max() < (1e-5 if dtype == torch.float32 else 2**-6) * twin.abs().max()


def test_parts_in_the_future_beyond_the_window_and_in_other_sequences_change_nothing():
    q, k, v, _ = inputs()
    backend = choose_backend("auto", q.device, q.dtype)

    def part(queries, keys, window):
        layout = part_layout(BOUNDS, window, queries, keys)
        return backend.forward(q[slice(*queries)], k[slice(*keys)], v[slice(*keys)], layout, SCALE)

    own = part((31, 60), (31, 60), 5)
    for unseen in ((60, 90), (0, 31), (90, 96)):  # later rows of the same sequence, other sequences
        empty = part((31, 60), unseen, 5)
        assert (empty[0] == 0).all()
        assert (empty[1] == float("-inf")).all()
        for order in ([own, empty], [empty, own]):
            merged = merge_parts(order)
            assert torch.equal(merged[0], own[0])
            assert torch.equal(merged[1], own[1])
    far = part((80, 90), (31, 60), 5)  # the same sequence, 21 rows before: beyond a window of 5
    assert (far[1] == float("-inf")).all()
    out, lse = merge_parts([far, far])
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    out, lse = apply_sinks(out, lse, LARGE)
    assert (out == 0).all()
    assert torch.equal(lse, LARGE.expand(10, HEADS))


def test_what_a_part_sees_is_told_in_its_own_rows():
    layout = part_layout(BOUNDS, 7, (24, 48), (0, 24))
    assert layout.spans == (Span(0, 6, 0, 24, 24),)
    assert part_layout(BOUNDS, None, (24, 48), (48, 72)).spans == (Span(7, 17, 0, 24, -17),)
    with pytest.raises(ValueError, match="rows 90 to 97 leave the 96 packed rows"):
        part_layout(BOUNDS, None, (90, 97), (0, 24))
    with pytest.raises(ValueError, match="got no part"):
        merge_parts([])


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 7])
def test_split_heads_with_their_sinks_are_the_whole(num_ranks, window):
    """2 key heads over 4 ranks: two ranks share each."""
    q, k, v, grad = inputs()

    def run(heads, kv_heads):
        leaves = [x.clone().requires_grad_() for x in (q[:, heads], k[:, kv_heads], v[:, kv_heads], LARGE[heads])]
        out = sink_attention(*leaves, cu_seqlens=BOUNDS, max_seqlen=60, scale=SCALE, window=window)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad[:, heads])]

    want = run(slice(None), slice(None))
    got = [torch.zeros_like(each) for each in want]
    for rank in range(num_ranks):
        heads, kv_heads = split_heads(HEADS, KV_HEADS, rank, num_ranks)
        out, dq, dk, dv, ds = run(heads, kv_heads)
        got[0][:, heads], got[1][:, heads], got[4][heads] = out, dq, ds
        got[2][:, kv_heads] += dk
        got[3][:, kv_heads] += dv
    for mine, whole in zip(got, want, strict=True):
        assert (mine - whole).abs().max() < 1e-12


def test_heads_that_do_not_divide_are_refused():
    assert split_heads(64, 8, 3, 4) == (slice(48, 64), slice(6, 8))
    assert split_heads(64, 8, 5, 16) == (slice(20, 24), slice(2, 3))
    for given in ((6, 2, 0, 4), (12, 8, 0, 12), (12, 3, 0, 2)):
        with pytest.raises(ValueError, match="cannot be split over"):
            split_heads(*given)
    with pytest.raises(ValueError, match="rank must be 0 to 1, got 2"):
        split_heads(4, 2, 2, 2)
