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

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from keel.ops.experts_gate import (
    ExpertsGate,
    activate,
    activate_backward,
    gated,
    open_gate,
    reaches_limit,
    wide,
)


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
    """The parameters of one layer: `gate_up` 2I wide, `down`; biases `[E, 2I]`, `[E, Hd]` or None."""

    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None

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
    check_experts(hidden, chosen, weights, experts, layout)
    return _SortedExperts.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden, chosen, weights, experts.gate_up, experts.gate_up_bias, experts.down, experts.down_bias, layout
    )


def experts_reference(
    hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, experts: ExpertsWeights, layout: ExpertsLayout
) -> torch.Tensor:
    """The slow twin: float64, every expert on every token, torch's own autograd."""
    x, out = hidden.double(), torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for expert in range(experts.num_experts):
        first, second = experts.gate_up[expert].double(), experts.down[expert].double()
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
    """Token-expert pairs sorted by expert: expert e has sorted rows `bounds[e]` to `bounds[e + 1] - 1`."""

    order: torch.Tensor  # [S] sorted row -> pair
    tokens: torch.Tensor  # [S] sorted row -> token
    rows: torch.Tensor  # [T, k] pair -> sorted row
    bounds: list[int]  # [E + 1]


def sort_by_expert(chosen: torch.Tensor, num_experts: int) -> Segments:
    """Sort the pairs of `chosen [T, k]` by expert, keeping the order of tokens within one."""
    flat = chosen.reshape(-1)
    order = torch.argsort(flat, stable=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(order.shape[0], device=order.device)
    ends = torch.bincount(flat, minlength=num_experts).cumsum(0).tolist()
    tokens = order.div(chosen.shape[1], rounding_mode="floor")
    return Segments(order, tokens, rows.view(chosen.shape), [0, *ends])


def sum_of_rows(table: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """`out[t] = sum over j of weights[t, j] * table[rows[t, j]]`, added in the order of j."""
    return functional.embedding_bag(rows, table, mode="sum", per_sample_weights=weights)


def _right_factor(weight: torch.Tensor, layout: ExpertsLayout, *, interleaved: bool) -> torch.Tensor:
    """One expert's weight as the `[in, out]` right factor of a product, gates before ups.

    Reordering one expert's columns costs a copy of its weight; reordering activations would cost one per token.
    """
    factor = weight if layout.transposed else weight.t()
    if not interleaved:
        return factor
    num_in, num_out = factor.shape
    return factor.reshape(num_in, num_out // 2, 2).transpose(1, 2).reshape(num_in, num_out)


def _store_factor_grad(
    grad: torch.Tensor, factor_grad: torch.Tensor, layout: ExpertsLayout, *, interleaved: bool
) -> None:
    """Write the gradient of `_right_factor(weight)` into `grad`, which has the layout of the weight."""
    target = grad if layout.transposed else grad.t()
    if interleaved:
        half = target.shape[1] // 2
        target.unflatten(1, (half, 2)).copy_(factor_grad.unflatten(1, (2, half)).transpose(1, 2))
    else:
        target.copy_(factor_grad)


def _gates_first(bias: torch.Tensor, layout: ExpertsLayout) -> torch.Tensor:
    """`[.., 2I]` biases, gates before ups."""
    return torch.cat((bias[..., ::2], bias[..., 1::2]), dim=-1) if layout.interleaved else bias


def _linear_into(out: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, bias: torch.Tensor | None) -> None:
    if bias is None:
        torch.mm(x, factor, out=out)
    else:
        torch.addmm(bias, x, factor, out=out)


class _SortedExperts(torch.autograd.Function):
    """Keeps the first projection's outputs `[S, 2I]`; everything else is made again in the backward pass."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd hands tensors by position
        ctx: Any,
        hidden: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        gate_up_bias: torch.Tensor | None,
        down: torch.Tensor,
        down_bias: torch.Tensor | None,
        layout: ExpertsLayout,
    ) -> torch.Tensor:
        segments = sort_by_expert(chosen, gate_up.shape[0])
        width = gate_up.shape[2 if layout.transposed else 1]
        pre = hidden.new_empty(segments.order.shape[0], width)  # [S, 2I], gates before ups
        results = hidden.new_empty(segments.order.shape[0], hidden.shape[1])  # [S, Hd]
        first_bias = None if gate_up_bias is None else _gates_first(gate_up_bias, layout)
        clamped = [False] * gate_up.shape[0]
        for expert, rows in busy(segments):
            x = hidden.index_select(0, segments.tokens[rows])
            factor = _right_factor(gate_up[expert], layout, interleaved=layout.interleaved)
            _linear_into(pre[rows], x, factor, None if first_bias is None else first_bias[expert])
            clamped[expert] = reaches_limit(pre[rows], layout)
            gate, up = pre[rows].chunk(2, dim=-1)
            act = activate(gate, up, layout, clamp=clamped[expert]).to(hidden.dtype)
            factor = _right_factor(down[expert], layout, interleaved=False)
            _linear_into(results[rows], act, factor, None if down_bias is None else down_bias[expert])
        ctx.save_for_backward(hidden, weights, gate_up, gate_up_bias, down, down_bias, pre)
        ctx.segments, ctx.layout, ctx.clamped = segments, layout, clamped
        return sum_of_rows(results, segments.rows, weights.to(results.dtype))

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> Any:
        hidden, weights, *parameters, pre = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads = [torch.empty_like(p) if needs[3 + i] else None for i, p in enumerate(parameters)]
        segments: Segments = ctx.segments
        grad_x = torch.empty(pre.shape[0], hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        grad_weights = torch.empty(pre.shape[0], dtype=wide(weights).dtype, device=hidden.device)
        sorted_weights = weights.reshape(-1).index_select(0, segments.order)
        for expert, rows in busy(segments):
            tokens = segments.tokens[rows]
            x, g = hidden.index_select(0, tokens), grad_out.index_select(0, tokens)
            one = _Expert(
                [None if p is None else p[expert] for p in parameters],
                [None if d is None else d[expert] for d in grads],
            )
            grad_weights[rows] = one.backward(
                x, g, sorted_weights[rows], pre[rows], ctx.layout, grad_x[rows], clamp=ctx.clamped[expert]
            )
        for expert in _idle(segments):
            for grad in grads:
                if grad is not None:
                    grad[expert].zero_()
        return (
            sum_of_rows(grad_x, segments.rows) if needs[0] else None,
            None,
            grad_weights[segments.rows].to(weights.dtype) if needs[2] else None,
            *grads,
            None,
        )


def busy(segments: Segments) -> list[tuple[int, slice]]:
    """Experts that have tokens, with their sorted rows."""
    pairs = enumerate(zip(segments.bounds[:-1], segments.bounds[1:], strict=True))
    return [(expert, slice(start, stop)) for expert, (start, stop) in pairs if stop > start]


def _idle(segments: Segments) -> list[int]:
    """Experts without a token, whose gradient is zero."""
    pairs = enumerate(zip(segments.bounds[:-1], segments.bounds[1:], strict=True))
    return [expert for expert, (start, stop) in pairs if stop == start]


@dataclass
class _Expert:
    """One expert's parameters (gate_up, its bias, down, its bias) and the places of their gradients."""

    parameters: list[torch.Tensor | None]
    grads: list[torch.Tensor | None]

    def backward(
        self,
        x: torch.Tensor,
        grad_out: torch.Tensor,
        weights: torch.Tensor,
        pre: torch.Tensor,
        layout: ExpertsLayout,
        grad_x: torch.Tensor,
        *,
        clamp: bool,
    ) -> torch.Tensor:
        """Fill `grads` and `grad_x [n, Hd]` of one segment; returns the gradient of its routing weights `[n]`.

        `grad_out [n, Hd]` is the gradient of the tokens' sums. With a = act, r = a @ D + d, the weight's gradient
        grad_out . r is (grad_out @ D.T) . a + grad_out . d, so r itself is not needed.
        """
        gate_up, _, down, down_bias = self.parameters
        assert gate_up is not None
        assert down is not None
        gate, up = pre.chunk(2, dim=-1)
        half = open_gate(gate, up, layout, clamp=clamp)
        act = gated(half, layout)
        down_factor = _right_factor(down, layout, interleaved=False)
        grad_act = wide(grad_out @ down_factor.t())
        grad_weights = (grad_act * act).sum(-1)
        if down_bias is not None:
            grad_weights += wide(grad_out @ down_bias)
        weighted = grad_out * weights[:, None].to(grad_out.dtype)
        self._store(2, act.to(x.dtype).t(), weighted, layout, interleaved=False)
        grad_act.mul_(weights[:, None].to(grad_act.dtype))
        grad_pre = activate_backward(grad_act, half, pre, layout, clamp=clamp)
        self._store(0, x.t(), grad_pre, layout, interleaved=layout.interleaved)
        factor = _right_factor(gate_up, layout, interleaved=layout.interleaved)
        torch.mm(grad_pre, factor.t(), out=grad_x)
        return grad_weights

    def _store(
        self, index: int, left: torch.Tensor, right: torch.Tensor, layout: ExpertsLayout, *, interleaved: bool
    ) -> None:
        """Gradients of weight number `index`, `left @ right`, and of its bias, the sum of `right`'s rows."""
        grad, grad_bias = self.grads[index], self.grads[index + 1]
        if grad is not None:
            _store_factor_grad(grad, left @ right, layout, interleaved=interleaved)
        if grad_bias is not None:
            total = right.sum(0)
            half = total.shape[0] // 2
            grad_bias.copy_(total.view(2, half).t().reshape(-1) if interleaved else total)
