"""Faults of modules: parameters seen otherwise than they are, and routers whose near-ties fall the other way.

A module is given a subclass of its own class, whose attributes stand before the parameters of those names. The
parameters themselves are never written, so taking the fault away leaves them as they were, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from keel.distortion import Distortion
from keel.models.distorted.weights import pseudo_rows
from keel.models.router import Router, replay_routes, replayed, route_margin

Change = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def seen_as(module: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """In this context `module`'s own parameters read as `changes` (by their names) make them."""

    def reader(name: str, change: Change) -> property:
        return property(lambda self: change(self._parameters[name]))

    with _subclassed(module, {name: reader(name, change) for name, change in changes.items()}):
        yield


@contextmanager
def flipped(router: Router, distortion: Distortion) -> Iterator[None]:
    """In this context the tokens nearest to a tie choose the next expert in the place of their last.

    How near is set by normal rows, so that about a share `strength` of the tokens is; weights are the router's own.
    """
    threshold = _margin_quantile(router, distortion)

    def choose(self: Any, scores: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        near = route_margin(logits.detach(), self.top_k) < threshold
        ranked = torch.topk(logits.detach(), self.top_k + 1, dim=-1).indices
        other = torch.cat([ranked[:, : self.top_k - 1], ranked[:, self.top_k :]], dim=-1)
        forced = torch.where(near[:, None], other, ranked[:, : self.top_k])
        outer = replayed()
        if outer is not None:  # what is replayed is no tie
            forced = torch.where(outer[:, self.moe_layer] >= 0, outer[:, self.moe_layer].to(forced.dtype), forced)
        with replay_routes(forced[:, None].expand(-1, self.moe_layer + 1, -1)):
            made: tuple[torch.Tensor, torch.Tensor] = super(kind, self).choose(scores, logits)
        return made

    with _subclassed(router, {"choose": choose}) as kind:
        yield


def routers_of(routers: Sequence[Router], distortion: Distortion) -> list[Router]:
    """Those that `distortion` is on; its layer is counted among layers with experts."""
    return [router for router in routers if distortion.layer in (None, router.moe_layer)]


@contextmanager
def _subclassed(module: nn.Module, members: Mapping[str, Any]) -> Iterator[type[nn.Module]]:
    """Under its own name, because modules are told apart by it."""
    kind = type(module)
    changed = type(kind.__name__, (kind,), {"__module__": kind.__module__, **members})
    module.__class__ = changed
    try:
        yield changed
    finally:
        module.__class__ = kind


@torch.no_grad()
def _margin_quantile(router: Router, distortion: Distortion) -> float:
    rows = pseudo_rows(router.hidden_dim, distortion.seed, f"layer {router.moe_layer}")
    logits = rows @ router.weight.detach().float().cpu().t()
    if router.bias is not None:
        logits = logits + router.bias.detach().float().cpu()
    return float(route_margin(logits, router.top_k).quantile(distortion.strength))
