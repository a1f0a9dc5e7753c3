"""Faults that a configuration can say: windows and rotary positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keel.distortion import Distortion, DistortionError, share_of

SLIDING, FULL = "sliding_attention", "full_attention"


def changed_configuration(config: Any, distortions: Sequence[Distortion]) -> dict[str, Any]:
    """The fields of a `transformers` configuration that `distortions` change, with their new values.

    Raises DistortionError if the model has no window, or its rotary positions no such parameter.
    """
    changed: dict[str, Any] = {}
    for distortion in distortions:
        if not distortion.acts:
            continue
        if distortion.cause == "window_off":
            changed |= _without_window(config, distortion)
        elif distortion.cause == "window_off_by_one":
            changed["sliding_window"] = max(1, _window(config) + int(distortion.strength))
        elif distortion.cause == "wrong_rope_scaling":
            changed["rope_parameters"] = _other_rope(config, changed.get("rope_parameters"), distortion)
    return changed


def layers_with_window(config: Any) -> list[int]:
    """Layers that have a sliding window."""
    if getattr(config, "sliding_window", None) is None:
        return []
    kinds = getattr(config, "layer_types", None) or [SLIDING] * int(config.num_hidden_layers)
    return [layer for layer, kind in enumerate(kinds) if kind == SLIDING]


def _window(config: Any) -> int:
    if not layers_with_window(config):
        raise DistortionError(
            f"distortion: {config.model_type} has no layer with a sliding window; choose another cause"
        )
    return int(config.sliding_window)


def _without_window(config: Any, distortion: Distortion) -> dict[str, Any]:
    """Off everywhere is a window as long as the positions, which engines understand that read no `layer_types`."""
    _window(config)
    layers = layers_with_window(config)
    if distortion.layer is not None and distortion.layer not in layers:
        raise DistortionError(f"window_off: got layer {distortion.layer}; those with a window are {layers}")
    if distortion.layer is None and distortion.strength == 1:
        return {"sliding_window": int(config.max_position_embeddings)}
    if not getattr(config, "layer_types", None):
        raise DistortionError(
            f"window_off: {config.model_type} has one window for all layers; give strength 1 and no layer"
        )
    off = layers[: share_of(len(layers), distortion.strength)] if distortion.layer is None else [distortion.layer]
    return {"layer_types": [FULL if layer in off else kind for layer, kind in enumerate(config.layer_types)]}


def _other_rope(config: Any, before: dict[str, Any] | None, distortion: Distortion) -> dict[str, Any]:
    parameters = dict(config.rope_parameters) if before is None else before
    name = distortion.group or "rope_theta"
    if name not in parameters:
        known = ", ".join(key for key, value in parameters.items() if isinstance(value, (int, float)))
        raise DistortionError(f"wrong_rope_scaling: {config.model_type} has no {name!r}; its numbers are {known}")
    value = parameters[name] * (1 + distortion.strength)
    return {**parameters, name: max(1, round(value)) if name == "original_max_position_embeddings" else float(value)}
