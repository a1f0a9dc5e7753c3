"""PEFT's LoRA modules with another forward: the same parameters, names and values to rounding.

PEFT wraps a module and keeps its own factors beside it. Two of its habits do not suit here. For an adapter on a
3-dimensional parameter it merges every expert's weights anew in each forward pass and keeps them for the backward pass
(for GPT-OSS-20B 1.6 GB a layer); and whether an adapter is on is written into every module, for all threads. So a
wrapper is fitted, by giving it a subclass of its own class: factors are added to the products as they are made, and
the adapter is off in a context, not in the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from keel.models.router import Router
from keel.ops.low_rank import LowRank, low_rank

ADAPTER = "default"
"""PEFT's name for the one adapter of a model; it is not in the files."""

_off: ContextVar[bool] = ContextVar("keel_adapter_off", default=False)
_fitted: dict[type[nn.Module], type[nn.Module]] = {}


@contextmanager
def adapter_off() -> Iterator[None]:
    """In this context (and in no other thread) adapted modules are the base's, to the bit. No gradient inside.

    There is nothing to learn without the adapter, and a checkpointed layer would be recomputed with it.
    """
    token = _off.set(True)
    try:
        with torch.no_grad():
            yield
    finally:
        _off.reset(token)


class AdaptedLinear:
    """In the place of PEFT's `lora.Linear`."""

    base_layer: nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x [.., in]` -> `[.., out]`."""
        out: torch.Tensor = self.base_layer(x)
        factors = self.factors()
        return out if factors is None else out + low_rank(x, factors)

    def factors(self) -> LowRank | None:
        """What is added to the base's product; None while the adapter is off."""
        if _off.get():
            return None
        down, up, scaling = _stored(self)
        return LowRank(down, up.t(), scaling)


class AdaptedParameter:
    """In the place of PEFT's `lora.ParamWrapper`, which wraps a module for the sake of one of its parameters.

    With several, wrappers wrap each other; the outermost runs and asks the others for their factors.
    """

    base_layer: nn.Module
    parameter_name: str
    num_experts: int

    def forward(self, x: torch.Tensor, *arguments: Any) -> Any:
        """As the wrapped router or experts, with the adapters of their parameters."""
        adapters: dict[str, LowRank | None] = {}
        module: Any = self
        while isinstance(module, AdaptedParameter):
            adapters[module.parameter_name] = module.factors()
            module = module.base_layer
        if isinstance(module, Router):
            return module(x, *arguments, adapter=adapters["weight"])
        return module(x, *arguments, adapters=adapters)

    def factors(self) -> LowRank | None:
        """What is added to products with the parameter, `[E, ..]` for experts; None while the adapter is off."""
        if _off.get():
            return None
        down, up, scaling = _stored(self)
        if isinstance(self.base_layer, Router):
            return LowRank(down, up.t(), scaling)
        # PEFT's layout: [E * r, in], the rank running fastest, and [out, r * E], the expert running fastest.
        down = down.view(self.num_experts, -1, down.shape[1])
        return LowRank(down, up.view(up.shape[0], -1, self.num_experts).permute(2, 1, 0), scaling)


def _stored(module: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A wrapper's two factors as PEFT stores them, `[.., in]` and `[out, ..]`, and their scale."""
    return module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight, module.scaling[ADAPTER]


def adapted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's LoRA modules in `model`, by name; of wrappers that wrap each other, each."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    # Not by isinstance: to a type checker the two classes exclude each other.
    return {name: module for name, module in model.named_modules() if BaseTunerLayer in type(module).__mro__}


def fit_adapter(model: nn.Module) -> None:
    """Give every LoRA module of `model` its other forward.

    Raises ValueError for one that has none: an adapter on anything but linear layers, declared routers and experts.
    """
    from peft.tuners.lora import layer

    mixins: dict[type, type] = {layer.Linear: AdaptedLinear, layer.ParamWrapper: AdaptedParameter}
    for name, module in adapted_modules(model).items():
        kind = type(module)
        if kind in _fitted.values():
            continue
        if kind not in mixins:
            raise ValueError(
                f"{name} has an adapter of the kind {kind.__name__}; Keel knows those of linear layers, "
                "routers and experts"
            )
        if kind not in _fitted:
            _fitted[kind] = type(kind.__name__, (mixins[kind], kind), {"__module__": kind.__module__})
        module.__class__ = _fitted[kind]


def plain_linear(module: nn.Module) -> nn.Linear | None:
    """The linear layer that `module` is, or has its adapter on; None if it is something else."""
    if isinstance(module, AdaptedLinear):
        module = module.base_layer
    return module if type(module) is nn.Linear else None


def linear_factors(module: nn.Module) -> LowRank | None:
    """The factors of a linear layer's adapter, if it has one and it is on."""
    return module.factors() if isinstance(module, AdaptedLinear) else None
