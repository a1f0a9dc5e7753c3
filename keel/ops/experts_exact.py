"""Mixture-of-experts layers in exact mode: one forward pass for engine and learner, the learner's backward behind it.

Each expert works on its own tokens, filled up to whole tiles: products, activation and the sum of a token's experts are
made in the same shapes whoever asks, so a token's bits depend on that token alone.
"""

from __future__ import annotations

from typing import Any

import torch

from keel.ops.experts import (
    ExpertsLayout,
    ExpertsWeights,
    SortedExperts,
    busy,
    joined,
    run_experts,
    sort_by_expert,
    sum_of_rows,
)
from keel.ops.experts_gate import reaches_limit, wide
from keel.ops.experts_one import adapters_of
from keel.ops.low_rank import add_low_rank_
from keel.ops.matmul import product_in_tiles
from keel.ops.numerics import silu, whole_tiles


def experts_exact(
    hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: ExpertsWeights, layout: ExpertsLayout
) -> torch.Tensor:
    """`experts_forward`, a token's bits depending on that token alone; arguments, gradients and errors as there."""
    return run_experts(ExactExperts, hidden, chosen, weights, experts, layout)


class ExactExperts(SortedExperts):
    """`SortedExperts` with another forward pass; what is kept, and the backward pass, are the same."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        layout: ExpertsLayout,
        scalings: tuple[float, float],
        *parameters: torch.Tensor | None,
    ) -> torch.Tensor:
        gate_up, gate_up_bias, down, down_bias, *factors = parameters
        assert gate_up is not None
        assert down is not None
        segments = sort_by_expert(chosen, gate_up.shape[0], fill=whole_tiles)
        first_adapter, second_adapter = adapters_of(factors, scalings)
        pres: list[torch.Tensor] = []  # [n, 2I] of each busy expert, gates before ups
        results: list[torch.Tensor] = []  # [n, Hd] of each
        clamped: list[bool] = []
        for expert, rows in busy(segments):
            x = hidden.index_select(0, segments.tokens[rows])
            first = gate_up[expert] if layout.transposed else gate_up[expert].t()
            pre = product_in_tiles(x, first, None if gate_up_bias is None else gate_up_bias[expert])
            add_low_rank_(pre, x, first_adapter[expert] if first_adapter else None)
            pres.append(torch.cat((pre[:, ::2], pre[:, 1::2]), dim=-1) if layout.interleaved else pre)
            clamped.append(reaches_limit(pres[-1], layout))
            act = exact_activation(pres[-1], layout).to(hidden.dtype)
            second = down[expert] if layout.transposed else down[expert].t()
            results.append(product_in_tiles(act, second, None if down_bias is None else down_bias[expert]))
            add_low_rank_(results[-1], act, second_adapter[expert] if second_adapter else None)
        ctx.save_for_backward(hidden, weights, *parameters, *pres)
        ctx.segments, ctx.layout, ctx.clamped, ctx.scalings = segments, layout, clamped, scalings
        return sum_of_rows(joined(results, hidden), segments.rows, weights.to(hidden.dtype))


def exact_activation(pre: torch.Tensor, layout: ExpertsLayout) -> torch.Tensor:
    """The gate of `pre [n, 2I]`, gates before ups, n whole tiles: silu apart from plain products and sums."""
    gate, up = (half.contiguous() for half in wide(pre).chunk(2, dim=-1))
    if layout.limit is not None:
        gate, up = gate.clamp(max=layout.limit), up.clamp(min=-layout.limit, max=layout.limit)
    opened = silu(gate * layout.alpha) / layout.alpha
    return opened * (up + layout.offset)
