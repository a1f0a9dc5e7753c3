"""The public face of sink attention: make it known to `transformers`, and say what a model's layers really use.

import keel.attention
keel.attention.register()
model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="keel")
print(keel.attention.explain(model))

docs/sink-attention.md says what is computed, how it is used and what is refused.
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


def register(backend: str | None = None) -> None:
    """Register `attn_implementation="keel"`, attention and mask function, with `transformers`.

    `backend` is "auto" (at first), "cpu", "cuda", "blocks", "cudnn", "flash_attn_2", "flash_attn_3", "flash_attn_4",
    "flex" or "reference", for all models that use "keel" from now on; None leaves it as it is. Raises
    AttentionBackendError for another name.
    """
    from keel.models import attention

    attention.register(backend)


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
    backend, reason, sinks = _backend(implementation, next(module.parameters()), _head_size(module))
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


def _head_size(module: torch.nn.Module) -> int | None:
    size = getattr(module, "head_dim", None)
    return size if isinstance(size, int) else None


_OTHERS: dict[str, tuple[str, SinkUse]] = {
    "eager": ("the model's own softmax over [T, T] scores, quadratic in memory", "exact"),
    "sdpa": ("torch's scaled_dot_product_attention, which has no place for a sink", "dropped"),
    "flash_attention_2": ("the package flash-attn 2, whose functions take no sink", "dropped"),
    "flash_attention_3": ("the package flash-attn 3, whose functions take no sink", "dropped"),
    "flash_attention_4": ("the package flash-attn 4, which has a sink of its own", "exact"),
    "flex_attention": ("flex attention; transformers scales its output by a differentiable log-sum-exp", "exact"),
}
"""What `transformers` does under its own names, read in its source (5.19)."""


def _backend(implementation: str, weight: torch.Tensor, head_size: int | None) -> tuple[str, str, SinkUse]:
    """(backend, reason, what becomes of sinks) of an implementation's name for weights such as `weight`."""
    if implementation == "keel":
        return _own_backend(weight, head_size)
    if implementation in _OTHERS:
        return implementation, *_OTHERS[implementation]
    return implementation, "not one of transformers' own, not checked by keel", "unknown"


def _own_backend(weight: torch.Tensor, head_size: int | None) -> tuple[str, str, SinkUse]:
    from keel.models.attention import chosen_backend
    from keel.ops.attention import REFERENCE, AttentionBackendError, choose_backend
    from keel.ops.attention.backends import OWN_SINKS

    name = chosen_backend()
    if name == REFERENCE:
        return name, "asked for by name: the dense softmax in float64, quadratic", "exact"
    if name == OWN_SINKS:
        return name, "asked for by name: the package's own sinks, forward and backward", "unknown"
    try:
        chosen = choose_backend(name, weight.device, weight.dtype, head_size)
    except AttentionBackendError as error:
        return "none", str(error), "unknown"
    how = "chosen automatically" if name == "auto" else "asked for by name"
    dtype = str(weight.dtype).removeprefix("torch.")
    fits = f"{how} for {dtype} on {weight.device.type}" + ("" if head_size is None else f", heads of {head_size}")
    return chosen.name, f"{chosen.reason}, {fits}; sinks by the exact correction of out and lse", "exact"
