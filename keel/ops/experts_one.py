"""One expert on its segment of sorted rows: the order of its factors, and its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from keel.ops.experts_gate import activate_backward, gated, open_gate, wide
from keel.ops.low_rank import LowRank, grad_of_small, low_rank_grads
from keel.ops.matmul import product

if TYPE_CHECKING:
    from keel.ops.experts import ExpertsLayout


def right_factor(weight: torch.Tensor, layout: ExpertsLayout, *, interleaved: bool) -> torch.Tensor:
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
    """Write the gradient of `right_factor(weight)` into `grad`, which has the layout of the weight."""
    target = grad if layout.transposed else grad.t()
    if interleaved:
        half = target.shape[1] // 2
        target.unflatten(1, (half, 2)).copy_(factor_grad.unflatten(1, (2, half)).transpose(1, 2))
    else:
        target.copy_(factor_grad)


def adapters_of(
    factors: Sequence[torch.Tensor | None], scalings: tuple[float, float]
) -> tuple[LowRank | None, LowRank | None]:
    """The adapters of the two products from `down`, `up`, `down`, `up`, each None where there is none."""
    pairs = zip(factors[::2], factors[1::2], scalings, strict=True)
    first, second = (None if down is None or up is None else LowRank(down, up, scale) for down, up, scale in pairs)
    return first, second


def gates_first_adapter(adapter: LowRank, layout: ExpertsLayout) -> LowRank:
    """One expert's adapter of the first product, its outputs gates before ups."""
    as_stored = replace(layout, transposed=True)  # [r, out]
    return replace(adapter, up=right_factor(adapter.up, as_stored, interleaved=layout.interleaved))


@dataclass
class OneExpert:
    """One expert's parameters (gate_up, its bias, down, its bias, two adapters) and the places of their gradients."""

    parameters: list[torch.Tensor | None]
    grads: list[torch.Tensor | None]
    scalings: tuple[float, float]

    def backward(
        self,
        x: torch.Tensor,
        grad_out: torch.Tensor,
        weights: torch.Tensor,
        pre: torch.Tensor,
        layout: ExpertsLayout,
        *,
        clamp: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill `grads` from one segment; returns the gradients of its inputs `[n, Hd]` and routing weights `[n]`.

        `grad_out [n, Hd]` is the gradient of the tokens' sums. With a = act, r = a @ D + d, the weight's gradient
        grad_out . r is (grad_out @ D.T) . a + grad_out . d, so r itself is not needed.
        """
        gate_up, _, down, down_bias, *adapters = self.parameters
        assert gate_up is not None
        assert down is not None
        first, second = adapters_of(adapters, self.scalings)
        gate, up = pre.chunk(2, dim=-1)
        half = open_gate(gate, up, layout, clamp=clamp)
        act = gated(half, layout)
        down_factor = right_factor(down, layout, interleaved=False)
        grad_act = product(grad_out, down_factor.t(), rows=x.shape[0])
        if second is not None:
            small = grad_of_small(grad_out, second)
            grad_act.addmm_(small, second.down)
        grad_act = wide(grad_act)
        grad_weights = (grad_act * act).sum(-1)
        if down_bias is not None:
            grad_weights += wide(grad_out @ down_bias)
        weighted = grad_out * weights[:, None].to(grad_out.dtype)
        self._store(2, act.to(x.dtype).t(), weighted, layout, interleaved=False)
        if second is not None:
            small = small * weights[:, None].to(small.dtype)
            self._store_adapter(6, low_rank_grads(act.to(x.dtype), weighted, small, second), layout, interleaved=False)
        grad_act.mul_(weights[:, None].to(grad_act.dtype))
        grad_pre = activate_backward(grad_act, half, pre, layout, clamp=clamp)
        self._store(0, x.t(), grad_pre, layout, interleaved=layout.interleaved)
        factor = right_factor(gate_up, layout, interleaved=layout.interleaved)
        grad_x = product(grad_pre, factor.t(), rows=x.shape[0])
        if first is not None:
            first = gates_first_adapter(first, layout)
            small = grad_of_small(grad_pre, first)
            grad_x.addmm_(small, first.down)
            grads = low_rank_grads(x, grad_pre, small, first)
            self._store_adapter(4, grads, layout, interleaved=layout.interleaved)
        return grad_x, grad_weights

    def _store_adapter(
        self, index: int, grads: tuple[torch.Tensor, torch.Tensor], layout: ExpertsLayout, *, interleaved: bool
    ) -> None:
        """Gradients of the adapter whose `down` is parameter number `index`."""
        down, up = self.grads[index : index + 2]
        if down is not None:
            down.copy_(grads[0])
        if up is not None:
            _store_factor_grad(up, grads[1], replace(layout, transposed=True), interleaved=interleaved)

    def _store(
        self, index: int, left: torch.Tensor, right: torch.Tensor, layout: ExpertsLayout, *, interleaved: bool
    ) -> None:
        """Gradients of weight number `index`, `left [.., n] @ right [n, ..]`, and of its bias, the sum of `right`."""
        grad, grad_bias = self.grads[index], self.grads[index + 1]
        if grad is not None:
            _store_factor_grad(grad, product(left, right, rows=right.shape[0]), layout, interleaved=interleaved)
        if grad_bias is not None:
            total = right.sum(0)
            half = total.shape[0] // 2
            grad_bias.copy_(total.view(2, half).t().reshape(-1) if interleaved else total)
