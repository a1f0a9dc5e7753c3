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
from keel.ops.experts_gate import halves, reaches_limit, wide
from keel.ops.experts_one import OneExpert, gates_first, is_turned
from keel.ops.experts_pieces import PiecePlan
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
        gate_up = parameters[0]
        assert gate_up is not None
        plan = PiecePlan(0, filled=False)
        segments = sort_by_expert(chosen, gate_up.shape[0], fill=whole_tiles)
        pres: list[torch.Tensor] = []  # [n, 2I] of each busy expert
        results: list[torch.Tensor] = []  # [n, Hd] of each
        clamped: list[bool] = []
        for expert, rows in busy(segments):
            x = hidden.index_select(0, segments.tokens[rows])
            one = OneExpert([None if p is None else p[expert] for p in parameters], scalings, layout, turned=False)
            pre = product_in_tiles(x, one.first, one.first_bias)
            add_low_rank_(pre, x, one.first_adapter)
            clamped.append(reaches_limit(pre, layout))
            act = exact_activation(pre, layout).to(hidden.dtype)
            results.append(product_in_tiles(act, one.second, one.second_bias))
            add_low_rank_(results[-1], act, one.second_adapter)
            pres.append(gates_first(pre) if is_turned(layout, x.shape[0], hidden.shape[1]) else pre)
        ctx.save_for_backward(hidden, weights, *parameters, *pres)
        ctx.segments, ctx.layout, ctx.clamped, ctx.scalings, ctx.plan = segments, layout, clamped, scalings, plan
        return sum_of_rows(joined(results, hidden), segments.rows, weights.to(hidden.dtype))


def exact_activation(pre: torch.Tensor, layout: ExpertsLayout) -> torch.Tensor:
    """The gate of `pre [n, 2I]` as stored, n whole tiles: silu apart from plain products and sums."""
    gate, up = (half.contiguous() for half in halves(wide(pre), in_pairs=layout.interleaved))
    if layout.limit is not None:
        gate, up = gate.clamp(max=layout.limit), up.clamp(min=-layout.limit, max=layout.limit)
    opened = silu(gate * layout.alpha) / layout.alpha
    return opened * (up + layout.offset)
