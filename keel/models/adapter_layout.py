"""What an adapter's factors are factors of: all that is needed to add them to their weights somewhere else."""

from __future__ import annotations

from typing import Any

from torch import nn

from keel.models.adapted import ADAPTER, AdaptedParameter, adapted_modules
from keel.models.router import Router


def adapter_layout(model: nn.Module) -> list[dict[str, Any]]:
    """One entry (JSON values) for each adapted weight, by names in `model`; empty without an adapter.

    `weight` is the base's own name for it, `down` and `up` the names of its factors, `scale` what their product is
    multiplied with. `num_experts` is 0 for a matrix `[out, in]`: then up @ down is added. Otherwise the factors are
    PEFT's for experts, `[E * r, in]` and `[out, r * E]`, and `swapped` says that the weight is `[E, out, in]` and not
    `[E, in, out]`.
    """
    entries = []
    for name, module in adapted_modules(model).items():
        wrapped: Any = module
        place = ".".join(part for part in name.split(".") if part != "base_layer")
        innermost = wrapped.base_layer
        while isinstance(innermost, AdaptedParameter):
            innermost = innermost.base_layer
        of_experts = isinstance(wrapped, AdaptedParameter) and not isinstance(innermost, Router)
        entries.append(
            {
                "weight": f"{place}.{getattr(wrapped, 'parameter_name', None) or 'weight'}",
                "down": f"{name}.lora_A.{ADAPTER}.weight",
                "up": f"{name}.lora_B.{ADAPTER}.weight",
                "scale": float(wrapped.scaling[ADAPTER]),
                "num_experts": int(wrapped.num_experts) if of_experts else 0,
                "swapped": bool(getattr(wrapped, "_did_swap_in_out_features", False)) if of_experts else False,
            }
        )
    return entries
