"""One expert on its rows: the order of its factors, its products, and its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from keel.ops.experts_gate import activate_backward, gated, halves, open_gate, wide
from keel.ops.low_rank import LowRank, add_low_rank_, grad_of_small, low_rank_grads
from keel.ops.matmul import product, product_into

if TYPE_CHECKING:
    from keel.ops.experts import ExpertsLayout

Views = Sequence[torch.Tensor | None]
"""gate_up, its bias, down, its bias, and `down`, `up` of both adapters: of one expert."""


def is_turned(layout: ExpertsLayout, num_rows: int, in_features: int) -> bool:
    """Whether an expert with `num_rows` rows works with its columns turned from gate0, up0, ... to gates before ups.

    Turning a weight costs a copy of it, forward and backward and for its gradient; leaving it costs strided
    activations, so it pays where rows are many.
    """
    return layout.interleaved and num_rows > in_features


def right_factor(weight: torch.Tensor, layout: ExpertsLayout, *, turned: bool) -> torch.Tensor:
    """One expert's weight as the `[in, out]` right factor of a product, its columns `turned` or as they are stored."""
    factor = weight if layout.transposed else weight.t()
    return gates_first(factor) if turned else factor


def gates_first(columns: torch.Tensor) -> torch.Tensor:
    """`[.., 2I]` gate0, up0, gate1, ... -> gates before ups."""
    return torch.cat((columns[..., ::2], columns[..., 1::2]), dim=-1)


def in_pairs(columns: torch.Tensor) -> torch.Tensor:
    """`[.., 2I]` gates before ups -> gate0, up0, gate1, ...: `[.., I, 2]`."""
    gates, ups = columns.chunk(2, dim=-1)
    return torch.stack((gates, ups), dim=-1)


def adapters_of(factors: Views, scalings: tuple[float, float]) -> tuple[LowRank | None, LowRank | None]:
    """The adapters of the two products from `down`, `up`, `down`, `up`, each None where there is none."""
    pairs = zip(factors[::2], factors[1::2], scalings, strict=True)
    first, second = (None if down is None or up is None else LowRank(down, up, scale) for down, up, scale in pairs)
    return first, second


class OneExpert:
    """One expert's two products. `in_pairs` says how the columns of the first lie: gate0, up0, ... or gates first."""

    def __init__(
        self, parameters: Views, scalings: tuple[float, float], layout: ExpertsLayout, *, turned: bool
    ) -> None:
        gate_up, first_bias, down, second_bias, *factors = parameters
        assert gate_up is not None
        assert down is not None
        self.layout = layout
        self.turned = turned
        self.in_pairs = layout.interleaved and not turned
        self.first = right_factor(gate_up, layout, turned=turned)  # [Hd, 2I]
        self.second = right_factor(down, layout, turned=False)  # [I, Hd]
        self.first_bias = gates_first(first_bias) if turned and first_bias is not None else first_bias
        self.second_bias = second_bias
        self.first_adapter, self.second_adapter = adapters_of(factors, scalings)
        if turned and self.first_adapter is not None:
            self.first_adapter = replace(self.first_adapter, up=gates_first(self.first_adapter.up))

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """The first product of rows `[n, Hd]`: `[n, 2I]`."""
        pre = product(x, self.first, rows=x.shape[0], bias=self.first_bias)
        add_low_rank_(pre, x, self.first_adapter)
        return pre

    def result(self, act: torch.Tensor) -> torch.Tensor:
        """The second product of activations `[n, I]`: `[n, Hd]`."""
        result = product(act, self.second, rows=act.shape[0], bias=self.second_bias)
        add_low_rank_(result, act, self.second_adapter)
        return result


class ExpertBackward(OneExpert):
    """The backward pass of one expert, a piece of its rows at a time.

    `grads` are the places of the parameters' gradients (None: not wanted), which `finish` fills. Where there is one
    piece, its products go there straight away; sums of several are kept in float32 at least until then.
    """

    def __init__(
        self,
        parameters: Views,
        grads: Views,
        scalings: tuple[float, float],
        layout: ExpertsLayout,
        *,
        turned: bool,
        num_pieces: int,
    ) -> None:
        super().__init__(parameters, scalings, layout, turned=turned)
        self.grads = grads
        self.sums: list[torch.Tensor | None] = [None] * len(grads)
        self.one_piece = num_pieces == 1

    def piece(
        self, x: torch.Tensor, grad_out: torch.Tensor, weights: torch.Tensor, pre: torch.Tensor, *, clamp: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of a piece's inputs `[n, Hd]` and routing weights `[n]`; those of parameters are added up.

        `grad_out [n, Hd]` is the gradient of the tokens' sums. With a = act, r = a @ D + d, the weight's gradient
        grad_out . r is (grad_out @ D.T) . a + grad_out . d, so r itself is not needed.
        """
        first, second = self.first_adapter, self.second_adapter
        half = open_gate(*halves(pre, in_pairs=self.in_pairs), self.layout, clamp=clamp)
        act = gated(half, self.layout)
        grad_act = product(grad_out, self.second.t(), rows=x.shape[0])
        if second is not None:
            small = grad_of_small(grad_out, second)
            grad_act.addmm_(small, second.down)
        grad_act = wide(grad_act)
        grad_weights = (grad_act * act).sum(-1)
        if self.second_bias is not None:
            grad_weights += wide(grad_out @ self.second_bias)
        weighted = grad_out * weights[:, None].to(grad_out.dtype)
        self._add(2, act.to(x.dtype), weighted)
        if second is not None:
            small = small * weights[:, None].to(small.dtype)
            self._add_pair(6, low_rank_grads(act.to(x.dtype), weighted, small, second))
        grad_act.mul_(weights[:, None].to(grad_act.dtype))
        grad_pre = activate_backward(grad_act, half, pre, self.layout, clamp=clamp, in_pairs=self.in_pairs)
        self._add(0, x, grad_pre)
        grad_x = product(grad_pre, self.first.t(), rows=x.shape[0])
        if first is not None:
            small = grad_of_small(grad_pre, first)
            grad_x.addmm_(small, first.down)
            self._add_pair(4, low_rank_grads(x, grad_pre, small, first))
        return grad_x, grad_weights

    def finish(self) -> None:
        """Put what the pieces added up to where it belongs."""
        for index, (grad, total) in enumerate(zip(self.grads, self.sums, strict=True)):
            if grad is None or total is None:
                continue
            turned = self.turned and index in (0, 1, 5)
            if turned and index == 0 and not self.layout.transposed:
                grad.t().unflatten(-1, (-1, 2)).copy_(in_pairs(total.t()))
            elif turned:
                grad.unflatten(-1, (-1, 2)).copy_(in_pairs(total))
            else:
                grad.copy_(total)

    def _add(self, index: int, left: torch.Tensor, right: torch.Tensor) -> None:
        """Of weight number `index`, `left [n, in]`'s outer products with `right [n, out]`; of its bias, their sum."""
        grad, grad_bias = self.grads[index], self.grads[index + 1]
        if grad is not None:
            left, right_ = (left.t(), right) if self.layout.transposed else (right.t(), left)
            if self.one_piece and not (self.turned and index == 0):
                product_into(grad, left, right_, rows=right.shape[0])
            else:
                self._sum(index, product(left, right_, rows=right.shape[0]))
        if grad_bias is not None:
            self._sum(index + 1, right.sum(0, dtype=wide(right[:0]).dtype))

    def _add_pair(self, index: int, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Gradients of the adapter whose `down` is parameter number `index`."""
        for place, grad in enumerate(pair, start=index):
            if self.grads[place] is not None:
                self._sum(place, grad)

    def _sum(self, index: int, part: torch.Tensor) -> None:
        total = self.sums[index]
        if total is None:
            self.sums[index] = part if self.one_piece else wide(part)
        else:
            total.add_(part)
