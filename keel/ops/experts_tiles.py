"""Mixture-of-experts layers for sampling: a token's bits depend on that token alone.

The sorted segments of `experts` give each expert a product as tall as its tokens are many, and where the bits of a row
change with the height of a product they then depend on other tokens. Here they do not:

    free heights    where it was measured that heights change nothing (`heights_are_free`): as in `experts`, each
                    expert on the rows that chose it, filled up to whole blocks
    few experts     else all of them on tiles of `TILE_ROWS` rows; those that a row did not choose have the weight
                    zero, and the second projection adds the experts of a row up in one product
    many experts    else each on the rows that chose it, in tiles of `TILE_ROWS` rows, the last filled up with zeros
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch.nn import functional

from keel.ops.experts import (
    ExpertsLayout,
    ExpertsWeights,
    Segments,
    busy,
    check_experts,
    sort_by_expert,
    sum_of_rows,
)
from keel.ops.experts_gate import activate
from keel.ops.low_rank import LowRank, add_low_rank_
from keel.ops.matmul import product

TILE_ROWS = 32
"""Rows of a tile where experts are many. In a product of fixed shape a row's bits do not depend on its place."""
MAX_DENSE_EXPERTS = 16
"""Up to this many experts are all computed: fewer and larger products, for work that is thrown away."""
_FEW_PAIRS = 256
_PROBED_HEIGHTS = (32, 64, 96, 128, 192)
_PROBE_ROWS = 256


@torch.no_grad()
def experts_row_invariant(
    hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: ExpertsWeights, layout: ExpertsLayout
) -> torch.Tensor:
    """`experts_forward` for sampling: a token's bits depend on that token alone, whatever else is in the call.

    No gradient. Arguments and errors as `experts_forward`.
    """
    check_experts(hidden, chosen, weights, experts, layout)
    num_tokens = hidden.shape[0]
    if num_tokens == 0:
        return hidden
    weights = weights.to(hidden.dtype)
    if _heights_are_free(experts):
        return _sorted_experts(hidden, chosen, weights, experts, layout)
    if experts.num_experts > MAX_DENSE_EXPERTS:
        return _chosen_experts(hidden, chosen, weights, experts, layout)
    padding = -num_tokens % TILE_ROWS
    hidden, chosen, weights = (functional.pad(each, (0, 0, 0, padding)) for each in (hidden, chosen, weights))
    tiles = zip(hidden.split(TILE_ROWS), chosen.split(TILE_ROWS), weights.split(TILE_ROWS), strict=True)
    return torch.cat([_all_experts(x, some, shares, experts, layout) for x, some, shares in tiles])[:num_tokens]


def _heights_are_free(experts: ExpertsWeights) -> bool:
    """Of both projections. An adapter's narrow products are another matter: they are made in tiles."""
    if experts.gate_up.device.type != "cpu":
        return False
    threads = torch.get_num_threads()
    return all(
        heights_are_free(tuple(stack.shape[1:]), stack.dtype, threads) for stack in (experts.gate_up, experts.down)
    )


@lru_cache(maxsize=64)
def heights_are_free(shape: tuple[int, int], dtype: torch.dtype, num_threads: int) -> bool:  # noqa: ARG001 - a key
    """Whether a row has the same bits in products of any whole number of tiles with a matrix of `shape`, both ways.

    A library picks the order of a sum by the shape of a product, by rules of its own; so it is measured, on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator).to(dtype)
    for right in (matrix, matrix.t()):
        left = torch.randn(_PROBE_ROWS, right.shape[0], generator=generator).to(dtype)
        whole = product(left, right, rows=_PROBE_ROWS)
        for height in _PROBED_HEIGHTS:
            for start in (0, 17, _PROBE_ROWS - height):
                rows = slice(start, start + height)
                if not torch.equal(product(left[rows].clone(), right, rows=height), whole[rows]):
                    return False
    return True


def _sorted_experts(
    hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: ExpertsWeights, layout: ExpertsLayout
) -> torch.Tensor:
    """Each expert on its own rows, filled up to whole tiles with rows of token 0, which nobody reads."""
    segments = _tiled_segments(chosen, experts.num_experts)
    bounds = [(e, slice(*each)) for e, each in enumerate(pairwise(segments.bounds)) if each[1] > each[0]]
    x = hidden.index_select(0, segments.tokens)
    first = [
        _times(x[rows], experts.gate_up[e], experts.gate_up_bias, experts.gate_up_adapter, e, layout)
        for e, rows in bounds
    ]
    # Filled up so that the share of each thread is whole vector registers: the last few numbers of a share may differ.
    first.append(hidden.new_zeros(-x.shape[0] % (TILE_ROWS * torch.get_num_threads()), first[0].shape[1]))
    act = activate(*_gates_and_ups(torch.cat(first), layout), layout).to(hidden.dtype)
    second = [
        _times(act[rows], experts.down[e], experts.down_bias, experts.down_adapter, e, layout) for e, rows in bounds
    ]
    return sum_of_rows(torch.cat(second), segments.rows, weights)


def _tiled_segments(chosen: torch.Tensor, num_experts: int) -> Segments:
    """Pairs sorted by expert, in whole tiles. The few of a decode pass are sorted here in a third of the time."""
    top_k = chosen.shape[1]
    if chosen.numel() > _FEW_PAIRS:
        return sort_by_expert(chosen, num_experts, fill=_whole_tiles)
    pairs: list[list[int]] = [[] for _ in range(num_experts)]
    for pair, expert in enumerate(chosen.flatten().tolist()):
        pairs[expert].append(pair)
    rows, tokens, bounds = [0] * chosen.numel(), [], [0]
    for own in pairs:
        for row, pair in enumerate(own, start=bounds[-1]):
            rows[pair] = row
        tokens += [pair // top_k for pair in own] + [0] * (_whole_tiles(len(own)) - len(own))
        bounds.append(len(tokens))
    return Segments(torch.tensor(tokens), torch.tensor(rows).view(chosen.shape), bounds)


def _whole_tiles(count: int) -> int:
    return -(-count // TILE_ROWS) * TILE_ROWS


def _times(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapter: LowRank | None,
    expert: int,
    layout: ExpertsLayout,
) -> torch.Tensor:
    """One expert's projection of `x [n, in]`, n in whole tiles."""
    right = weight if layout.transposed else weight.t()
    made = product(x, right, rows=x.shape[0], bias=None if bias is None else bias[expert])
    if adapter is not None:
        own = adapter[expert]
        for tile, rows in zip(made.split(TILE_ROWS), x.split(TILE_ROWS), strict=True):
            add_low_rank_(tile, rows, own)
    return made


def _all_experts(
    hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: ExpertsWeights, layout: ExpertsLayout
) -> torch.Tensor:
    """act [T, E * I], weighted, times the second projections one below the other, which adds the experts up.

    An expert of weight zero adds zeros as long as its activation is finite.
    """
    num_experts, num_rows = experts.num_experts, hidden.shape[0]
    spread = hidden.new_zeros(num_rows, num_experts).scatter_(1, chosen, weights)  # [T, E]
    gate, up = _gates_and_ups(_first_products(hidden, experts, layout), layout)
    act = activate(gate, up, layout).mul_(spread[..., None]).to(hidden.dtype)  # [T, E, I]
    if layout.transposed:
        result = product(act.flatten(1), experts.down.flatten(0, 1), rows=num_rows)
    else:
        parts = (product(act[:, e].contiguous(), experts.down[e].t(), rows=num_rows) for e in range(num_experts))
        result = sum(parts, start=hidden.new_zeros(()))
    if experts.down_bias is not None:
        result.addmm_(spread, experts.down_bias)
    if experts.down_adapter is not None:
        for expert in range(num_experts):
            add_low_rank_(result, act[:, expert], experts.down_adapter[expert])
    return result


def _first_products(hidden: torch.Tensor, experts: ExpertsWeights, layout: ExpertsLayout) -> torch.Tensor:
    """Every expert's first projection of every row, `[T, E, 2I]`."""
    num_experts, num_rows = experts.num_experts, hidden.shape[0]
    if layout.transposed:
        bias = experts.gate_up_bias
        parts = [
            product(hidden, experts.gate_up[e], rows=num_rows, bias=None if bias is None else bias[e])
            for e in range(num_experts)
        ]
        pre = torch.cat(parts, dim=1)
    else:
        bias = None if experts.gate_up_bias is None else experts.gate_up_bias.flatten()
        pre = product(hidden, experts.gate_up.flatten(0, 1).t(), rows=num_rows, bias=bias)
    pre = pre.view(num_rows, num_experts, -1)
    if experts.gate_up_adapter is not None:
        for expert in range(num_experts):
            add_low_rank_(pre[:, expert], hidden, experts.gate_up_adapter[expert])
    return pre


def _gates_and_ups(pre: torch.Tensor, layout: ExpertsLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of `[.., 2I]`."""
    if layout.interleaved:
        return pre[..., ::2], pre[..., 1::2]
    gate, up = pre.chunk(2, dim=-1)
    return gate, up


def _chosen_experts(
    hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: ExpertsWeights, layout: ExpertsLayout
) -> torch.Tensor:
    """Only the experts that were chosen, each on its own rows filled up to tiles."""
    segments = sort_by_expert(chosen, experts.num_experts)
    results = hidden.new_empty(segments.tokens.shape[0], hidden.shape[1])
    for expert, rows in busy(segments):
        for start in range(rows.start, rows.stop, TILE_ROWS):
            part = slice(start, min(start + TILE_ROWS, rows.stop))
            x = hidden.new_zeros(TILE_ROWS, hidden.shape[1])
            x[: part.stop - part.start] = hidden.index_select(0, segments.tokens[part])
            results[part] = _one_expert(x, expert, experts, layout)[: part.stop - part.start]
    return sum_of_rows(results, segments.rows, weights)


def _one_expert(x: torch.Tensor, expert: int, experts: ExpertsWeights, layout: ExpertsLayout) -> torch.Tensor:
    first = experts.gate_up[expert] if layout.transposed else experts.gate_up[expert].t()
    second = experts.down[expert] if layout.transposed else experts.down[expert].t()
    bias = None if experts.gate_up_bias is None else experts.gate_up_bias[expert]
    pre = product(x, first, rows=TILE_ROWS, bias=bias)
    add_low_rank_(pre, x, experts.gate_up_adapter[expert] if experts.gate_up_adapter else None)
    act = activate(*_gates_and_ups(pre, layout), layout).to(x.dtype)
    bias = None if experts.down_bias is None else experts.down_bias[expert]
    result = product(act, second, rows=TILE_ROWS, bias=bias)
    add_low_rank_(result, act, experts.down_adapter[expert] if experts.down_adapter else None)
    return result
