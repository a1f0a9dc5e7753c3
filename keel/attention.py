"""The public face of sink attention: make it known to `transformers`, and say what a model's layers really use.

import keel.attention
keel.attention.register()
model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="keel")
print(keel.attention.explain(model))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

SinkUse = Literal["none", "exact", "dropped", "unknown"]


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One attention layer: which backend computes it and why, its window, and what becomes of its sinks.

    `sinks`: "none" (the layer has none), "exact" (in values and gradients), "dropped" (ignored: wrong results),
    "unknown" (left to a kernel that was not checked).
    """

    name: str
    layer: int
    implementation: str
    backend: str
    reason: str
    window: int | None
    sinks: SinkUse


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """What `explain` found, one entry per layer; as text, one line per layer."""

    layers: tuple[LayerAttention, ...]

    def __str__(self) -> str:
        return "\n".join(
            f"layer {layer.layer}: {layer.implementation} -> {layer.backend} ({layer.reason}), "
            f"window {layer.window or 'none'}, sinks {layer.sinks}"
            for layer in self.layers
        )


def register() -> None:
    """Register `attn_implementation="keel"`, attention and mask function, with `transformers`."""
    from keel.models import attention

    attention.register()


def explain(model: torch.nn.Module) -> AttentionReport:
    """Backend, reason and sink use of every attention layer of a loaded `transformers` model.

    Raises ValueError if no attention layer is found.
    """
    layers = [
        _explain_layer(name, module)
        for name, module in model.named_modules()
        if hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups")
    ]
    if not layers:
        raise ValueError(
            f"no attention layer found in {type(model).__name__}: expected modules with layer_idx and "
            "num_key_value_groups, as transformers' causal models have; pass the loaded transformers model"
        )
    return AttentionReport(tuple(layers))


def _explain_layer(name: str, module: torch.nn.Module) -> LayerAttention:
    implementation = str(getattr(getattr(module, "config", None), "_attn_implementation", "eager"))
    backend, reason, sinks = _backend(implementation, next(module.parameters()))
    window = getattr(module, "sliding_window", None)
    return LayerAttention(
        name=name,
        layer=int(getattr(module, "layer_idx", -1)),
        implementation=implementation,
        backend=backend,
        reason=reason,
        window=window if isinstance(window, int) else None,
        sinks=sinks if getattr(module, "sinks", None) is not None else "none",
    )


def _backend(implementation: str, weight: torch.Tensor) -> tuple[str, str, SinkUse]:
    """(backend, reason, what becomes of sinks) of an implementation's name for weights such as `weight`."""
    from keel.ops.attention import AttentionBackendError, choose_backend

    if implementation == "keel":
        try:
            chosen = choose_backend("auto", weight.device, weight.dtype)
        except AttentionBackendError as error:
            return "none", str(error), "unknown"
        return chosen.name, f"{chosen.reason}; sinks by the exact correction of out and lse", "exact"
    if implementation == "eager":
        return "eager", "the model's own softmax over [T, T] scores, quadratic in memory", "exact"
    if implementation == "sdpa":
        return "sdpa", "torch's scaled_dot_product_attention, which has no place for a sink", "dropped"
    return implementation, "transformers' own integration, not checked by keel", "unknown"
