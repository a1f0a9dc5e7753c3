"""Low-rank additions: against weights with the addition merged in, in float64, and what they must not touch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from keel.ops.experts import ExpertsLayout, ExpertsWeights, experts_forward, experts_reference
from keel.ops.experts_tiles import MAX_DENSE_EXPERTS, TILE_ROWS, experts_row_invariant
from keel.ops.low_rank import LowRank, low_rank

HIDDEN, INNER, EXPERTS, TOP_K, RANK = 12, 10, 5, 2, 3
GPT_OSS = ExpertsLayout(transposed=True, interleaved=True, alpha=1.702, offset=1.0, limit=0.9)
LAYOUTS = pytest.mark.parametrize("layout", [GPT_OSS, ExpertsLayout()], ids=["gpt_oss", "qwen3_moe"])


def draw(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(0.5).to(dtype).requires_grad_()


def adapted(layout, *, num_experts=EXPERTS, rank=RANK, dtype=torch.float64, hidden=HIDDEN, inner=INNER):
    generator = torch.Generator().manual_seed(7)
    sizes = ((hidden, 2 * inner), (inner, hidden))
    stored = [draw(generator, num_experts, *(s if layout.transposed else s[::-1]), dtype=dtype) for s in sizes]
    biases = [draw(generator, num_experts, s[1], dtype=dtype) if layout.interleaved else None for s in sizes]
    adapters = [
        LowRank(
            draw(generator, num_experts, rank, s[0], dtype=dtype),
            # As PEFT stores it, so that a gradient must find its way through a permuted view.
            draw(generator, s[1], rank, num_experts, dtype=dtype).permute(2, 1, 0),
            0.75,
        )
        for s in sizes
    ]
    return ExpertsWeights(stored[0], biases[0], stored[1], biases[1], *adapters)


def inputs(num_tokens=41, num_experts=EXPERTS, *, dtype=torch.float64, hidden=HIDDEN):
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    scores[:, 2] = -1.0  # an expert without a token
    chosen = torch.topk(scores, TOP_K, dim=-1).indices
    return draw(generator, num_tokens, hidden, dtype=dtype), chosen, draw(generator, num_tokens, TOP_K, dtype=dtype)


def leaves_of(experts):
    own = [experts.gate_up, experts.gate_up_bias, experts.down, experts.down_bias]
    for adapter in (experts.gate_up_adapter, experts.down_adapter):
        own += [adapter.down, adapter.up]
    return [leaf for leaf in own if leaf is not None]


@LAYOUTS
def test_experts_with_adapters_match_merged_weights_values_and_gradients(layout):
    grad = torch.randn(41, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for run in (experts_forward, experts_reference):
        experts, (x, chosen, shares) = adapted(layout), inputs()
        out = run(x, chosen, shares, experts, layout)
        results.append([out, *torch.autograd.grad(out, [x, shares, *leaves_of(experts)], grad)])
    assert len(results[0]) == len(results[1]) >= 9
    for ours, twin in zip(*results, strict=True):
        torch.testing.assert_close(ours, twin, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(experts_row_invariant(x, chosen, shares, experts, layout), results[1][0])


@LAYOUTS
def test_frozen_weights_cost_no_gradient(layout):
    experts, (x, chosen, shares) = adapted(layout), inputs()
    frozen = replace(experts, gate_up=experts.gate_up.detach(), down=experts.down.detach())
    factors = leaves_of(experts)[-4:]
    full, alone = (
        torch.autograd.grad(experts_forward(x, chosen, shares, each, layout).square().sum(), factors)
        for each in (experts, frozen)
    )
    for ours, theirs in zip(full, alone, strict=True):
        assert torch.equal(ours, theirs)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(layout, dtype):
    experts, (x, chosen, shares) = adapted(layout, dtype=dtype), inputs(300, dtype=dtype)
    adapters = (experts.gate_up_adapter, experts.down_adapter)
    fresh = [replace(adapter, up=torch.zeros_like(adapter.up)) for adapter in adapters]
    base = replace(experts, gate_up_adapter=None, down_adapter=None)
    fresh = replace(base, gate_up_adapter=fresh[0], down_adapter=fresh[1])
    for run in (experts_forward, experts_row_invariant):
        with torch.no_grad():
            bare = run(x, chosen, shares, base, layout)
            assert torch.equal(run(x, chosen, shares, fresh, layout), bare)
            assert not torch.equal(run(x, chosen, shares, experts, layout), bare)


@LAYOUTS
@pytest.mark.parametrize("rank", [1, 2, 8, 16])
@pytest.mark.parametrize("num_experts", [6, MAX_DENSE_EXPERTS + 3])
def test_rows_of_sampling_experts_do_not_depend_on_their_company(layout, rank, num_experts):
    sizes = {"hidden": 77, "inner": 75}  # in no register's multiple
    for dtype in (torch.float32, torch.bfloat16):
        experts = adapted(layout, num_experts=num_experts, rank=rank, dtype=dtype, **sizes)
        x, chosen, shares = (t.detach() for t in inputs(3 * TILE_ROWS, num_experts, dtype=dtype, hidden=77))
        whole = experts_row_invariant(x, chosen, shares, experts, layout)
        order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(4))
        shuffled = experts_row_invariant(x[order], chosen[order], shares[order], experts, layout)
        assert torch.equal(whole[order], shuffled)
        assert torch.equal(whole[5:18], experts_row_invariant(x[5:18], chosen[5:18], shares[5:18], experts, layout))


def test_the_addition_and_its_gradients():
    generator = torch.Generator().manual_seed(3)
    x, down, up = draw(generator, 9, 6), draw(generator, 2, 6), draw(generator, 2, 4)
    added = low_rank(x, LowRank(down, up, 0.5))
    torch.testing.assert_close(added, x @ (0.5 * down.t() @ up))
    assert torch.equal(added[None], low_rank(x[None], LowRank(down, up, 0.5)))
    assert torch.autograd.gradcheck(lambda *tensors: low_rank(tensors[0], LowRank(*tensors[1:], 0.5)), (x, down, up))
