"""The gated activation of an expert, forward and backward, in whole kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class ExpertsGate:
    """act = gate' * sigmoid(alpha * gate') * (up' + offset) with gate' = min(gate, limit), up' = clamp(up, +-limit)."""

    alpha: float = 1.0
    offset: float = 0.0
    limit: float | None = None


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Elementwise work is done in float32 at least."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def reaches_limit(pre: torch.Tensor, gating: ExpertsGate) -> bool:
    """Whether the clamp of `pre [n, 2I]` would change anything, or might: off the CPU asking costs more than clamping.

    Most segments never reach it, and leaving out a clamp that changes nothing changes no bit. A nan stays a nan.
    """
    if gating.limit is None:
        return False
    if pre.device.type != "cpu":
        return True
    low, high = (float(end) for end in pre.aminmax())
    return not (high <= gating.limit and low >= -gating.limit)


def halves(pre: torch.Tensor, *, in_pairs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up of `pre [.., 2I]`, views of it: it holds gate0, up0, gate1, ... or all gates before all ups."""
    if in_pairs:
        return pre[..., ::2], pre[..., 1::2]
    gate, up = pre.chunk(2, dim=-1)
    return gate, up


@dataclass(frozen=True)
class OpenedGate:
    """A gate half way: `opened` = gate' * sigmoid(alpha * gate'), of `scaled` = alpha * gate', and the clamped `up`."""

    scaled: torch.Tensor
    opened: torch.Tensor
    up: torch.Tensor


def open_gate(gate: torch.Tensor, up: torch.Tensor, gating: ExpertsGate, *, clamp: bool) -> OpenedGate:
    """gate * sigmoid(alpha * gate) is silu(alpha * gate) / alpha, which is one kernel."""
    gate, up = wide(gate), wide(up)
    if clamp and gating.limit is not None:
        gate, up = gate.clamp(max=gating.limit), up.clamp(min=-gating.limit, max=gating.limit)
    if gating.alpha == 1.0:
        return OpenedGate(gate, functional.silu(gate), up)
    scaled = gate * gating.alpha
    return OpenedGate(scaled, functional.silu(scaled).mul_(1.0 / gating.alpha), up)


def gated(half: OpenedGate, gating: ExpertsGate) -> torch.Tensor:
    """The activation: what the gate lets through of `up + offset`."""
    if gating.offset == 1.0:
        return torch.addcmul(half.opened, half.opened, half.up)
    return half.opened * (half.up + gating.offset if gating.offset else half.up)


def activate(gate: torch.Tensor, up: torch.Tensor, gating: ExpertsGate, *, clamp: bool = True) -> torch.Tensor:
    """The gated activation of raw `gate` and `up`, in float32 at least; `clamp` False if nothing reaches the limit."""
    return gated(open_gate(gate, up, gating, clamp=clamp), gating)


def activate_backward(
    grad_act: torch.Tensor, half: OpenedGate, pre: torch.Tensor, gating: ExpertsGate, *, clamp: bool, in_pairs: bool
) -> torch.Tensor:
    """Gradient `[n, 2I]` of `pre` from that of the activation; `grad_act` and `half` are consumed."""
    grad_up = half.opened.mul_(grad_act)
    grad_gate = grad_act.mul_(half.up + gating.offset if gating.offset else half.up)
    grad_gate = torch.ops.aten.silu_backward(grad_gate, half.scaled)
    if clamp and gating.limit is not None:
        gate, up = halves(pre, in_pairs=in_pairs)
        grad_gate.masked_fill_(gate > gating.limit, 0.0)
        grad_up.masked_fill_(up.abs() > gating.limit, 0.0)
    if in_pairs:
        return torch.stack((grad_gate, grad_up), dim=-1).flatten(-2).to(pre.dtype)
    return torch.cat((grad_gate, grad_up), dim=-1).to(pre.dtype)
