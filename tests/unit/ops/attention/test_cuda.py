"""What is told to torch's CUDA flash kernels, with the kernels themselves written out from their documentation.

No card is needed: the stand-ins below take the very arguments of the kernels, on the CPU, in float64. tests/gpu runs
the kernels.
"""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.flex_attention

from keel.ops.attention import (
    AttentionBackendError,
    Span,
    build_layout,
    cudnn,
    dense_attention,
    flash_packages,
    flex,
    layout_attention,
    packed_layout,
)
from keel.ops.attention import cuda as cuda_backend
from keel.ops.attention.backends import BACKENDS

HEADS, KV_HEADS, SIZE, SCALE = 6, 2, 8, 0.29
RAGGED = (5, 70, 0, 33, 1, 16)
PACKED = torch.tensor([0, *RAGGED]).cumsum(0)
PARTS = {  # as in test_blocks: spans over 40 queries and 90 keys
    "cache": ((0, 20, 0, 50, 30), (20, 20, 50, 40, 20)),
    "padding": ((3, 17, 3, 17, 0), (20, 12, 40, 12, 0)),
    "before the keys": ((0, 20, 0, 50, -5),),
    "nothing seen": ((0, 20, 0, 50, -20), (20, 20, 0, 0, 0)),
    "other order": ((20, 20, 50, 40, 20), (0, 20, 0, 50, 30)),
}


def visible(num_queries, num_keys, is_causal, left, right):
    """FlashAttention's masks: the last query stands at the last key; -1 is no limit; causal is `right` = 0."""
    right = 0 if is_causal else right
    row = torch.arange(num_queries)[:, None] + num_keys - num_queries
    column = torch.arange(num_keys)
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    seen &= (column <= row + right) if right >= 0 else True
    return seen & ((column >= row - left) if left >= 0 else True)


def per_sequence(query, key, cu_q, cu_k, max_q, max_k, is_causal, left, right):
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q > 1, "at a bound of 1 the kernel lays rows out otherwise"
    for (q_start, q_stop), (k_start, k_stop) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        assert q_stop - q_start <= max_q
        assert k_stop - k_start <= max_k
        keys = slice(k_start, k_stop)
        repeated = key[keys].repeat_interleave(query.shape[1] // key.shape[1], 1)
        seen = visible(q_stop - q_start, k_stop - k_start, is_causal, left, right)
        assert bool(seen.any(-1).all()), "the kernel's answer for a row that sees nothing is not relied on"
        yield slice(q_start, q_stop), keys, repeated, seen


def flash_forward(
    query, key, value, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
    *, scale, window_size_left, window_size_right,
):  # fmt: skip
    assert dropout_p == 0.0
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], query.shape[0])
    pieces = per_sequence(query, key, cu_q, cu_k, max_q, max_k, is_causal, window_size_left, window_size_right)
    for rows, keys, repeated, seen in pieces:
        scores = torch.einsum("nhd,mhd->hnm", query[rows], repeated) * scale
        scores = scores.masked_fill(~seen, -math.inf)
        lse[:, rows] = scores.logsumexp(-1)
        values = value[keys].repeat_interleave(query.shape[1] // key.shape[1], 1)
        out[rows] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values)
    return out, lse, torch.zeros(2), torch.empty(0), torch.empty(0)


def flash_backward(
    grad_out, query, key, value, out, logsumexp, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state, unused,
    *, scale, window_size_left, window_size_right,
):  # fmt: skip
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    given = (grad_out, query, key, value, out, logsumexp, cu_q, cu_k, max_q, max_k, is_causal)
    return gradients(*given, scale, window_size_left, window_size_right)


def gradients(grad_out, query, key, value, out, logsumexp, cu_q, cu_k, max_q, max_k, is_causal, scale, left, right):
    assert logsumexp.shape == (query.shape[1], query.shape[0])
    assert logsumexp.is_contiguous()
    group = query.shape[1] // key.shape[1]
    dq, dk, dv = (torch.zeros_like(x) for x in (query, key, value))
    pieces = per_sequence(query, key, cu_q, cu_k, max_q, max_k, is_causal, left, right)
    for rows, keys, repeated, seen in pieces:
        scores = torch.einsum("nhd,mhd->hnm", query[rows], repeated) * scale
        p = torch.exp(scores - logsumexp[:, rows, None].to(scores.dtype)).masked_fill(~seen, 0.0)
        values = value[keys].repeat_interleave(group, 1)
        delta = (grad_out[rows] * out[rows]).sum(-1).t()[..., None]
        ds = p * (torch.einsum("nhd,mhd->hnm", grad_out[rows], values) - delta) * scale
        dq[rows] = torch.einsum("hnm,mhd->nhd", ds, repeated)
        dk[keys] = torch.einsum("hnm,nhd->mhd", ds, query[rows]).unflatten(1, (-1, group)).sum(2)
        dv[keys] = torch.einsum("hnm,nhd->mhd", p, grad_out[rows]).unflatten(1, (-1, group)).sum(2)
    return dq, dk, dv


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The backend "cuda" with its kernels replaced, taking float64 on the CPU."""
    import dataclasses

    monkeypatch.setattr(cuda_backend, "_forward", flash_forward)
    monkeypatch.setattr(cuda_backend, "_backward", flash_backward)
    taking = dataclasses.replace(BACKENDS["cuda"], device_types=("cpu",), dtypes=(torch.float64,))
    monkeypatch.setitem(BACKENDS, "cuda", taking)


def values_and_gradients(layout, backend):
    draw = torch.Generator().manual_seed(3)
    shapes = [(layout.num_query_rows, HEADS, SIZE), *[(layout.num_key_rows, KV_HEADS, SIZE)] * 2, (HEADS,)]
    given = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
    out = layout_attention(*given, layout=layout, scale=SCALE, backend=backend)
    weight = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, given, weight)]


def layouts():
    for window in (None, 1, 7, 32, 200):
        yield f"packed {window}", packed_layout(PACKED, window)
        yield f"short {window}", packed_layout(torch.tensor([0, 1, 2]), window)
        for name, spans in PARTS.items():
            yield f"{name} {window}", build_layout(tuple(Span(*span) for span in spans), window, 40, 90)


@pytest.mark.parametrize("layout", [pytest.param(layout, id=name) for name, layout in layouts()])
def test_what_the_kernels_are_told_gives_the_dense_twins_values_and_gradients(on_the_cpu, layout):
    pairs = zip(values_and_gradients(layout, "cuda"), values_and_gradients(layout, "reference"), strict=True)
    for name, (got, want) in zip(("out", "dq", "dk", "dv", "ds"), pairs, strict=True):
        # lse is handed over in float32, as the kernel keeps it.
        assert (got - want).abs().max() < (1e-12 if name == "out" else 1e-5), name


@pytest.mark.parametrize("name", PARTS)
def test_a_row_that_sees_nothing_is_zero_and_minus_infinity(on_the_cpu, name):
    layout = build_layout(tuple(Span(*span) for span in PARTS[name]), 7, 40, 90)
    q, k, v = (torch.randn(rows, heads, SIZE).double() for rows, heads in ((40, HEADS), (90, KV_HEADS), (90, KV_HEADS)))
    out, lse = cuda_backend.forward(q, k, v, layout, SCALE)
    twin, twin_lse = dense_attention(q, k, v, None, layout, SCALE)
    assert torch.equal(lse == -math.inf, twin_lse == -math.inf)
    assert torch.equal(out == 0, twin == 0)


def test_what_was_said_of_determinism_before_stands_again(on_the_cpu):
    assert not torch.are_deterministic_algorithms_enabled()
    values_and_gradients(packed_layout(PACKED, 7), "cuda")
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_kernels_of_this_torch_take_these_arguments():
    """On the meta device torch checks the call and the shapes without computing anything."""
    layout = packed_layout(PACKED, 7)
    total = sum(RAGGED)
    given = [
        torch.empty(total, heads, SIZE, dtype=torch.bfloat16, device="meta") for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    out, lse = cuda_backend.forward(*given, layout, SCALE)
    assert (out.shape, lse.shape, lse.dtype) == ((total, HEADS, SIZE), (total, HEADS), torch.float32)
    gradients = cuda_backend.backward(out, *given, out, lse, layout, SCALE)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in given]


def test_what_the_kernels_cannot_do_is_refused(on_the_cpu):
    ring = build_layout((Span(0, 20, 0, 8, 10),), None, 20, 8)
    shared = build_layout((Span(0, 20, 0, 50, 30), Span(20, 20, 10, 50, 30)), None, 40, 90)
    for layout, message in ((ring, "beyond its keys"), (shared, "one sequence each")):
        with pytest.raises(AttentionBackendError, match=message):
            values_and_gradients(layout, "cuda")
    odd = torch.zeros(4, 2, 10, dtype=torch.float64)
    with pytest.raises(AttentionBackendError, match="multiples of 8 up to 256, got 10"):
        layout_attention(
            odd, odd, odd, None, layout=packed_layout(torch.tensor([0, 4]), None), scale=1.0, backend="cuda"
        )


def flash_attn_2_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False, num_splits=0,
):  # fmt: skip
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    windows = {"window_size_left": window_size_left, "window_size_right": window_size_right}
    out, lse, *_ = flash_forward(q, k, v, *lengths, dropout_p, causal, False, scale=softmax_scale, **windows)
    return out, lse, torch.empty(0), torch.zeros(2)


def flash_attn_2_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
    rng_state=None, zero_tensors=False,
):  # fmt: skip
    assert (dropout_p, softcap, alibi_slopes, deterministic) == (0.0, 0.0, None, True)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    made = gradients(
        dout, q, k, v, out, softmax_lse, *lengths, causal, softmax_scale, window_size_left, window_size_right
    )
    for place, gradient in zip((dq, dk, dv), made, strict=True):
        place.copy_(gradient)
    return torch.empty(0)


def flash_attn_3_forward(
    q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None,
    seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None,
    leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None,
    v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0,
    softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    windows = {"window_size_left": window_size_left, "window_size_right": window_size_right}
    out, lse, *_ = flash_forward(q, k, v, *lengths, 0.0, causal, False, scale=softmax_scale, **windows)
    return out, lse, torch.empty(0), torch.empty(0)


def flash_attn_3_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
    max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
    window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    assert deterministic
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    made = gradients(
        dout, q, k, v, out, softmax_lse, *lengths, is_causal, softmax_scale, window_size_left, window_size_right
    )
    for place, gradient in zip((dq, dk, dv), made, strict=True):
        place.copy_(gradient)
    return torch.empty(0)


def flash_attn_4(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    return_lse=False,
):  # fmt: skip
    """With the sink as a column of the scores; differentiated by autograd, as the package's function is by its own."""
    left, right = (-1 if side is None else side for side in window_size)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    outs = []
    for rows, keys, repeated, seen in per_sequence(q, k, *lengths, causal, left, right):
        scores = torch.einsum("nhd,mhd->hnm", q[rows], repeated) * softmax_scale
        column = learnable_sink[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.cat([scores.masked_fill(~seen, -math.inf), column], -1).softmax(-1)[..., :-1]
        values = v[keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
        outs.append(torch.einsum("hnm,mhd->nhd", weights, values))
    return torch.cat(outs), None


@pytest.fixture
def packages(monkeypatch):
    """The packages, as far as their signatures go, and the backends that use them, taking float64 on the CPU."""
    import dataclasses

    functions = {
        flash_packages.MODULE_2: {
            "_flash_attn_varlen_forward": flash_attn_2_forward,
            "_flash_attn_varlen_backward": flash_attn_2_backward,
        },
        flash_packages.MODULE_3: {
            "_flash_attn_forward": flash_attn_3_forward,
            "_flash_attn_backward": flash_attn_3_backward,
        },
        flash_packages.MODULE_4: {"flash_attn_varlen_func": flash_attn_4},
    }
    for module, found in functions.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**found))
    for name in ("flash_attn_2", "flash_attn_3"):
        free = {"device_types": ("cpu",), "dtypes": (torch.float64,), "package": None, "refuses_device": None}
        monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], **free))
    flash_packages._function.cache_clear()
    yield
    flash_packages._function.cache_clear()


@pytest.mark.parametrize("layout", [pytest.param(layout, id=name) for name, layout in layouts()])
@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3"])
def test_what_the_packages_are_told_gives_the_dense_twins_values_and_gradients(packages, name, layout):
    pairs = zip(values_and_gradients(layout, name), values_and_gradients(layout, "reference"), strict=True)
    for what, (got, want) in zip(("out", "dq", "dk", "dv", "ds"), pairs, strict=True):
        assert (got - want).abs().max() < (1e-12 if what == "out" else 1e-5), what


@pytest.mark.parametrize("window", [None, 1, 7, 32])
def test_a_package_with_sinks_of_its_own_is_told_the_same(packages, window):
    layout = packed_layout(PACKED, window)
    pairs = zip(values_and_gradients(layout, "flash_attn_4"), values_and_gradients(layout, "reference"), strict=True)
    assert all((got - want).abs().max() < 1e-12 for got, want in pairs)
    padded = build_layout((Span(3, 17, 3, 17, 0),), window, 40, 90)
    with pytest.raises(AttentionBackendError, match="a check on whole packed sequences"):
        values_and_gradients(padded, "flash_attn_4")


def test_packages_that_are_not_there_are_named():
    with pytest.raises(AttentionBackendError, match=r"flash_attn_varlen_func cannot be had: .*install the package"):
        values_and_gradients(packed_layout(PACKED, None), "flash_attn_4")


def cudnn_forward(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, *, scale
):  # fmt: skip
    assert (attn_bias, compute_log_sumexp, dropout_p, is_causal) == (None, True, 0.0, True)
    group = query.shape[1] // key.shape[1]
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    scores = (query @ key.repeat_interleave(group, 1).transpose(2, 3) * scale).masked_fill(hidden, -math.inf)
    out = scores.softmax(-1) @ value.repeat_interleave(group, 1)
    return out, scores.logsumexp(-1, keepdim=True), None, None, 0, 0, torch.zeros(()), torch.zeros(()), None


def cudnn_backward(
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k,
    max_q, max_k, dropout_p, is_causal, *, scale,
):  # fmt: skip
    assert (attn_bias, cum_seq_q, cum_seq_k, dropout_p, is_causal) == (None, None, None, 0.0, True)
    assert (max_q, max_k, logsumexp.shape) == (query.shape[2], key.shape[2], (*query.shape[:3], 1))
    group = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    p = torch.exp(query @ keys.transpose(2, 3) * scale - logsumexp).masked_fill(hidden, 0.0)
    ds = p * (grad_out @ values.transpose(2, 3) - (grad_out * out).sum(-1, keepdim=True)) * scale
    dk, dv = ((x.transpose(2, 3) @ y).unflatten(1, (-1, group)).sum(2) for x, y in ((ds, query), (p, grad_out)))
    return ds @ keys, dk, dv


@pytest.fixture
def cudnn_on_the_cpu(monkeypatch):
    import dataclasses

    monkeypatch.setattr(cudnn, "_forward", cudnn_forward)
    monkeypatch.setattr(cudnn, "_backward", cudnn_backward)
    taking = dataclasses.replace(BACKENDS["cudnn"], device_types=("cpu",), dtypes=(torch.float64,))
    monkeypatch.setitem(BACKENDS, "cudnn", taking)


@pytest.mark.parametrize("lengths", [RAGGED, (16, 16), (1,), (3, 19, 20, 18)])
def test_what_cudnn_is_told_gives_the_dense_twins_values_and_gradients(cudnn_on_the_cpu, lengths):
    layout = packed_layout(torch.tensor([0, *lengths]).cumsum(0), None)
    pairs = zip(values_and_gradients(layout, "cudnn"), values_and_gradients(layout, "reference"), strict=True)
    for what, (got, want) in zip(("out", "dq", "dk", "dv", "ds"), pairs, strict=True):
        assert (got - want).abs().max() < 1e-12, what


def test_padding_that_nobody_computes_and_what_cudnn_cannot_do(cudnn_on_the_cpu):
    padded = build_layout((Span(3, 17, 3, 17, 0), Span(20, 12, 20, 12, 0)), None, 40, 40)
    pairs = zip(values_and_gradients(padded, "cudnn"), values_and_gradients(padded, "reference"), strict=True)
    assert all((got - want).abs().max() < 1e-12 for got, want in pairs)
    with pytest.raises(AttentionBackendError, match="has no window"):
        values_and_gradients(packed_layout(PACKED, 7), "cudnn")
    for span in (Span(0, 20, 0, 50, 30), Span(3, 17, 0, 17, 0)):
        with pytest.raises(AttentionBackendError, match="takes whole sequences"):
            values_and_gradients(build_layout((span,), None, 40, 90), "cudnn")


def test_cudnns_functions_in_this_torch_take_these_arguments():
    """On the meta device torch checks the call and the shapes without computing anything."""
    layout, total = packed_layout(PACKED, None), sum(RAGGED)
    given = [
        torch.empty(total, heads, SIZE, dtype=torch.bfloat16, device="meta") for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    out, lse = cudnn.forward(*given, layout, SCALE)
    assert (out.shape, lse.shape, lse.dtype) == ((total, HEADS, SIZE), (total, HEADS), torch.float32)
    gradients = cudnn.backward(out, *given, out, lse, layout, SCALE)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in given]


@pytest.fixture
def flex_on_the_cpu(monkeypatch):
    """Torch's flex attention as it is, uncompiled, in float64: torch alone says that its backward is not for CPUs."""
    import dataclasses

    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "_kernel", lambda: torch.nn.attention.flex_attention.flex_attention)
    free = {"device_types": ("cpu",), "refuses_size": None}
    monkeypatch.setitem(BACKENDS, "flex", dataclasses.replace(BACKENDS["flex"], **free))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("layout", [pytest.param(layout, id=name) for name, layout in layouts() if "200" not in name])
def test_flex_attention_gives_the_dense_twins_values_and_gradients(flex_on_the_cpu, layout):
    pairs = zip(values_and_gradients(layout, "flex"), values_and_gradients(layout, "reference"), strict=True)
    for what, (got, want) in zip(("out", "dq", "dk", "dv", "ds"), pairs, strict=True):
        assert (got - want).abs().max() < 1e-12, what


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", PARTS)
def test_to_flex_too_a_row_that_sees_nothing_is_zero_and_minus_infinity(flex_on_the_cpu, name):
    layout = build_layout(tuple(Span(*span) for span in PARTS[name]), 7, 40, 90)
    q, k, v = (torch.randn(rows, heads, SIZE).double() for rows, heads in ((40, HEADS), (90, KV_HEADS), (90, KV_HEADS)))
    out, lse = flex.forward(q, k, v, layout, SCALE)
    twin, twin_lse = dense_attention(q, k, v, None, layout, SCALE)
    assert torch.equal(lse == -math.inf, twin_lse == -math.inf)
    assert torch.equal(out == 0, twin == 0)


def test_flex_refuses_keys_that_several_spans_share(flex_on_the_cpu):
    shared = build_layout((Span(0, 20, 0, 50, 30), Span(20, 20, 10, 50, 30)), None, 40, 90)
    with pytest.raises(AttentionBackendError, match="flex takes keys of one sequence each"):
        values_and_gradients(shared, "flex")
