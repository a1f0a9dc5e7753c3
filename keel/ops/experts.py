"""Mixture-of-experts layers for training: sorted segments, and a slow twin. For sampling see `experts_tiles`.

For each token and each of its k experts:

    gate, up = split(x @ W_e + b_e)
    act      = gate' * sigmoid(alpha * gate') * (up' + offset)      gate' = min(gate, limit), up' = clamp(up, +-limit)
    out      = sum over its experts of weight * (act @ D_e + d_e)

which is GPT-OSS's clamped SwiGLU (alpha 1.702, offset 1, limit 7) and, with alpha 1, offset 0 and no limit, everybody
else's gate. `S = T * k` token-expert pairs are sorted by expert once; each expert then works on one contiguous segment.
There is no one-hot mask, no copy of more than one expert's weights, and no addition whose order is left to chance: a
token's k results are summed by position, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from keel.ops.experts_gate import ExpertsGate, activate, halves, reaches_limit
from keel.ops.experts_one import ExpertBackward, OneExpert, is_turned
from keel.ops.experts_pieces import piece_plan
from keel.ops.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class ExpertsLayout(ExpertsGate):
    """How a family stores its experts, and how it gates them.

    `transposed`: weights are `[E, in, out]` (x @ W), else `[E, out, in]`. `interleaved`: the first projection's outputs
    are gate0, up0, gate1, up1, ..., else all gates and then all ups.
    """

    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class ExpertsWeights:
    """The parameters of one layer: `gate_up` 2I wide, `down`; biases `[E, 2I]`, `[E, Hd]` or None.

    An adapter is added to each expert's products; its `up` has the outputs in the order in which they are stored.
    """

    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    gate_up_adapter: LowRank | None = None
    down_adapter: LowRank | None = None

    @property
    def num_experts(self) -> int:
        return int(self.gate_up.shape[0])


def experts_forward(
    hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: ExpertsWeights, layout: ExpertsLayout
) -> torch.Tensor:
    """Weighted sum of each token's experts, `[T, Hd]`, differentiable in everything but `chosen`.

    Args:
        hidden: `[T, Hd]`.
        chosen: `[T, k]` integer, experts of each token, each in 0 .. E - 1.
        weights: `[T, k]`, of the type of `hidden`.
        experts: the layer's parameters.
        layout: how they are stored and gated.

    Raises:
        ValueError: shapes that do not fit.
    """
    return run_experts(SortedExperts, hidden, chosen, weights, experts, layout)


def run_experts(
    function: type[SortedExperts],
    hidden: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    experts: ExpertsWeights,
    layout: ExpertsLayout,
) -> torch.Tensor:
    """`experts_forward` by the autograd step `function`."""
    check_experts(hidden, chosen, weights, experts, layout)
    adapters = (experts.gate_up_adapter, experts.down_adapter)
    return function.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden,
        chosen,
        weights,
        layout,
        tuple(adapter.scaling if adapter else 0.0 for adapter in adapters),
        experts.gate_up,
        experts.gate_up_bias,
        experts.down,
        experts.down_bias,
        *(factor for adapter in adapters for factor in ((adapter.down, adapter.up) if adapter else (None, None))),
    )


def experts_reference(
    hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: ExpertsWeights, layout: ExpertsLayout
) -> torch.Tensor:
    """The slow twin: float64, every expert on every token, torch's own autograd."""
    x, out = hidden.double(), torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for expert in range(experts.num_experts):
        first, second = (
            _merged(weight[expert].double(), adapter, expert, layout)
            for weight, adapter in ((experts.gate_up, experts.gate_up_adapter), (experts.down, experts.down_adapter))
        )
        gate_up = x @ (first if layout.transposed else first.t())
        if experts.gate_up_bias is not None:
            gate_up = gate_up + experts.gate_up_bias[expert].double()
        gate, up = (gate_up[:, ::2], gate_up[:, 1::2]) if layout.interleaved else gate_up.chunk(2, dim=-1)
        if layout.limit is not None:
            gate, up = gate.clamp(max=layout.limit), up.clamp(min=-layout.limit, max=layout.limit)
        act = gate * torch.sigmoid(layout.alpha * gate) * (up + layout.offset)
        result = act @ (second if layout.transposed else second.t())
        if experts.down_bias is not None:
            result = result + experts.down_bias[expert].double()
        share = torch.where(chosen == expert, weights.double(), 0.0).sum(-1)
        out = out + share[:, None] * result
    return out


def _merged(weight: torch.Tensor, adapter: LowRank | None, expert: int, layout: ExpertsLayout) -> torch.Tensor:
    """One expert's weight, the adapter merged into it."""
    if adapter is None:
        return weight
    addition = adapter.scaling * adapter.down[expert].double().t() @ adapter.up[expert].double()
    return weight + (addition if layout.transposed else addition.t())


def check_experts(
    hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: ExpertsWeights, layout: ExpertsLayout
) -> None:
    """Raise ValueError, with what was got, if the shapes do not fit together."""
    out_dim, in_dim = (2, 1) if layout.transposed else (1, 2)
    inner = experts.gate_up.shape[out_dim] // 2
    fits = (
        hidden.dim() == 2
        and experts.gate_up.shape[in_dim] == hidden.shape[1]
        and experts.down.shape[in_dim] == inner
        and experts.down.shape[out_dim] == hidden.shape[1]
    )
    if not fits:
        raise ValueError(
            f"experts: got hidden {tuple(hidden.shape)}, gate_up {tuple(experts.gate_up.shape)}, down "
            f"{tuple(experts.down.shape)} with transposed={layout.transposed}; they do not fit together"
        )
    if chosen.dim() != 2 or chosen.shape[0] != hidden.shape[0] or weights.shape != chosen.shape:
        raise ValueError(
            f"experts: got chosen {tuple(chosen.shape)}, weights {tuple(weights.shape)} for {hidden.shape[0]} tokens; "
            "both need [T, k]"
        )


@dataclass(frozen=True)
class Segments:
    """Token-expert pairs sorted by expert: expert e has sorted rows `bounds[e]` to `bounds[e + 1] - 1`.

    With padding, an expert's rows are filled up with rows of token 0 that no pair points to.
    """

    tokens: torch.Tensor  # [P] sorted row -> token
    rows: torch.Tensor  # [T, k] pair -> sorted row
    bounds: list[int]  # [E + 1]


def sort_by_expert(chosen: torch.Tensor, num_experts: int, *, fill: Callable[[int], int] | None = None) -> Segments:
    """Sort the pairs of `chosen [T, k]` by expert, keeping the order of tokens within one.

    `fill` says how many rows an expert's number of pairs is filled up to; None: no more than there are.
    """
    flat = chosen.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    taken = [fill(count) if fill else count for count in counts.tolist()]
    bounds = list(accumulate(taken, initial=0))
    shift = torch.tensor(bounds[:-1], device=flat.device) - (counts.cumsum(0) - counts)
    places = torch.arange(flat.shape[0], device=flat.device)
    rows = torch.empty_like(order)
    rows[order] = places + shift[flat[order]]
    tokens = order.new_zeros(bounds[-1])
    tokens[rows] = places.div(chosen.shape[1], rounding_mode="floor")
    return Segments(tokens, rows.view(chosen.shape), bounds)


def sum_of_rows(table: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """`out[t] = sum over j of weights[t, j] * table[rows[t, j]]`, added in the order of j."""
    return functional.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)


class SortedExperts(torch.autograd.Function):
    """Keeps the first projection's outputs `[S, 2I]`; everything else is made again in the backward pass."""

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
        plan = piece_plan(hidden, gate_up)
        segments = sort_by_expert(chosen, gate_up.shape[0], fill=plan.fill)
        pres: list[torch.Tensor] = []  # [n, 2I] of each piece
        results: list[torch.Tensor] = []  # [n, Hd] of each
        clamped: list[bool] = []
        for expert, rows in busy(segments):
            turned = is_turned(layout, rows.stop - rows.start, hidden.shape[1])
            one = OneExpert([None if p is None else p[expert] for p in parameters], scalings, layout, turned=turned)
            for piece in plan.pieces(rows):
                x = hidden.index_select(0, segments.tokens[piece])
                pres.append(one.project(x))
                clamped.append(reaches_limit(pres[-1], layout))
                gate, up = halves(pres[-1], in_pairs=one.in_pairs)
                results.append(one.result(activate(gate, up, layout, clamp=clamped[-1]).to(hidden.dtype)))
        ctx.save_for_backward(hidden, weights, *parameters, *pres)
        ctx.segments, ctx.layout, ctx.clamped, ctx.scalings, ctx.plan = segments, layout, clamped, scalings, plan
        return sum_of_rows(joined(results, hidden), segments.rows, weights.to(hidden.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> Any:
        saved = ctx.saved_tensors  # once: a checkpoint hands its tensors out a single time
        (hidden, weights, *parameters), pres = saved[:10], saved[10:]
        needs = ctx.needs_input_grad
        grads = [torch.empty_like(p) if needs[5 + i] else None for i, p in enumerate(parameters)]
        segments: Segments = ctx.segments
        # Padding rows have weight zero, so whatever they repeat gives nothing to any gradient.
        sorted_weights = weights.new_zeros(segments.tokens.shape[0])
        sorted_weights[segments.rows.view(-1)] = weights.reshape(-1)
        grads_x: list[torch.Tensor] = []
        grad_weights: list[torch.Tensor] = []
        kept = zip(pres, ctx.clamped, strict=True)
        for expert, rows in busy(segments):
            pieces = ctx.plan.pieces(rows)
            one = ExpertBackward(
                [None if p is None else p[expert] for p in parameters],
                [None if d is None else d[expert] for d in grads],
                ctx.scalings,
                ctx.layout,
                turned=is_turned(ctx.layout, rows.stop - rows.start, hidden.shape[1]),
                num_pieces=len(pieces),
            )
            for piece, (pre, clamp) in zip(pieces, kept, strict=False):
                tokens = segments.tokens[piece]
                x, g = hidden.index_select(0, tokens), grad_out.index_select(0, tokens)
                grad_x, grad_weight = one.piece(x, g, sorted_weights[piece], pre, clamp=clamp)
                grads_x.append(grad_x)
                grad_weights.append(grad_weight)
            one.finish()
        for expert in _idle(segments):
            for grad in grads:
                if grad is not None:
                    grad[expert].zero_()
        return (
            sum_of_rows(joined(grads_x, hidden), segments.rows) if needs[0] else None,
            None,
            torch.cat(grad_weights)[segments.rows].to(weights.dtype) if needs[2] and grad_weights else None,
            None,
            None,
            *grads,
        )


def joined(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The segments' rows after each other, `[P, Hd]`; without any segment, none."""
    return torch.cat(parts) if parts else like.new_empty(0, like.shape[1])


def busy(segments: Segments) -> list[tuple[int, slice]]:
    """Experts that have tokens, with their sorted rows."""
    pairs = enumerate(zip(segments.bounds[:-1], segments.bounds[1:], strict=True))
    return [(expert, slice(start, stop)) for expert, (start, stop) in pairs if stop > start]


def _idle(segments: Segments) -> list[int]:
    """Experts without a token, whose gradient is zero."""
    pairs = enumerate(zip(segments.bounds[:-1], segments.bounds[1:], strict=True))
    return [expert for expert, (start, stop) in pairs if stop == start]
