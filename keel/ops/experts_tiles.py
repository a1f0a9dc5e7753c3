"""Mixture-of-experts layers for sampling: a token's bits depend on that token alone.

The sorted segments of `experts` give each expert a product as tall as its tokens are many, and the bits of a row change
with the height of the product. Here every product has the same height.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from keel.ops.experts import ExpertsLayout, ExpertsWeights, busy, check_experts, sort_by_expert, sum_of_rows
from keel.ops.experts_gate import activate
from keel.ops.low_rank import add_low_rank_, add_low_rank_batched

TILE_ROWS = 32
"""Rows of a tile of the row-invariant variant. In a product of fixed shape a row's bits do not depend on its place."""
MAX_DENSE_EXPERTS = 16
"""Up to this many experts, the row-invariant variant computes them all in one batched product instead of sorting."""


@torch.no_grad()
def experts_row_invariant(
    hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: ExpertsWeights, layout: ExpertsLayout
) -> torch.Tensor:
    """`experts_forward` for sampling: a token's bits depend on that token alone, whatever else is in the call.

    Every product has `TILE_ROWS` rows, filled up with zeros, so neither the number of tokens nor their company nor
    their place matters. No gradient. Arguments and errors as `experts_forward`.
    """
    check_experts(hidden, chosen, weights, experts, layout)
    tiles = _dense_tile if experts.num_experts <= MAX_DENSE_EXPERTS else _sorted_tile
    num_tokens = hidden.shape[0]
    padding = -num_tokens % TILE_ROWS
    if padding:
        hidden = functional.pad(hidden, (0, 0, 0, padding))
        chosen = functional.pad(chosen, (0, 0, 0, padding))
        weights = functional.pad(weights, (0, 0, 0, padding))
    parts = [
        tiles(hidden[rows], chosen[rows], weights[rows].to(hidden.dtype), experts, layout)
        for rows in (slice(start, start + TILE_ROWS) for start in range(0, num_tokens, TILE_ROWS))
    ]
    return torch.cat(parts)[:num_tokens] if parts else hidden


def _dense_tile(
    hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: ExpertsWeights, layout: ExpertsLayout
) -> torch.Tensor:
    """All experts on one tile as a batched product, then each row's own k results."""
    num_experts, rows = experts.num_experts, hidden.shape[0]
    first = experts.gate_up if layout.transposed else experts.gate_up.transpose(1, 2)
    second = experts.down if layout.transposed else experts.down.transpose(1, 2)
    x = hidden.expand(num_experts, rows, -1)
    pre = add_low_rank_batched(_batched(x, first, experts.gate_up_bias), x, experts.gate_up_adapter)
    gate, up = (pre[..., ::2], pre[..., 1::2]) if layout.interleaved else pre.chunk(2, dim=-1)
    act = activate(gate, up, layout).to(hidden.dtype)
    results = add_low_rank_batched(_batched(act, second, experts.down_bias), act, experts.down_adapter)
    place = torch.arange(rows, device=hidden.device)[:, None]
    return sum_of_rows(results.flatten(0, 1), chosen * rows + place, weights)


def _batched(x: torch.Tensor, factor: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.bmm(x, factor) if bias is None else torch.baddbmm(bias[:, None], x, factor)


def _sorted_tile(
    hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: ExpertsWeights, layout: ExpertsLayout
) -> torch.Tensor:
    """Only the experts the tile chose, each on its own rows filled up to a tile."""
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
    pre = x @ first if experts.gate_up_bias is None else torch.addmm(experts.gate_up_bias[expert], x, first)
    add_low_rank_(pre, x, experts.gate_up_adapter[expert] if experts.gate_up_adapter else None)
    gate, up = (pre[..., ::2], pre[..., 1::2]) if layout.interleaved else pre.chunk(2, dim=-1)
    act = activate(gate, up, layout).to(x.dtype)
    result = act @ second if experts.down_bias is None else torch.addmm(experts.down_bias[expert], act, second)
    add_low_rank_(result, act, experts.down_adapter[expert] if experts.down_adapter else None)
    return result
