"""Ways in which a stack may compute something else than the model's own directory says, as changes of the reference.

Each is made on the `transformers` module itself (a parameter, a mask, the rotary frequencies) and taken back after the
pass. None of this knows how faults are planted elsewhere: what is found here is found by what it does to log-probs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NO_SINK = -1e9
EXPERT_CHANGES = ("gate_up_exchanged", "gate_up_layout", "gate_up_transposed", "down_transposed", "all_transposed")
ROPE_CHANGES = ("theta", "factor", "original", "attention", "linear", "none")


@dataclass(frozen=True)
class Change:
    """One thing done otherwise. `kind` says what, `detail` which of its ways, `layer` where (None: everywhere).

    `value`: sinks: share of the sink's weight that is lost, 1 all of it; window: tokens added to it; rope: what the
    named number is multiplied by; experts, stale and weights_bfloat16: how far the weights go to the wrong ones, 1 all
    the way. `experts` are those concerned, None: all of them.
    """

    kind: str
    value: float = 1.0
    layer: int | None = None
    detail: str = ""
    experts: tuple[int, ...] | None = None

    def at(self, layer: int) -> bool:
        return self.layer is None or self.layer == layer


def layer_of(name: str) -> int | None:
    """The layer a parameter belongs to, by its name, or None."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


def windows(layer_windows: Sequence[int | None], changes: Sequence[Change]) -> tuple[int | None, ...]:
    """Each layer's window (keys that a token sees, itself counted) under `changes`."""
    found = list(layer_windows)
    for change in changes:
        for layer, window in enumerate(found):
            if change.kind == "window" and window is not None and change.at(layer):
                found[layer] = None if change.detail == "off" else max(1, window + round(change.value))
    return tuple(found)


def changed_parameters(
    model: nn.Module, changes: Sequence[Change], earlier: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """New values of the parameters that `changes` touch, by name."""
    new: dict[str, torch.Tensor] = {}
    own = dict(model.named_parameters())
    for change in changes:
        if change.kind in _PARAMETER_CHANGES:
            new |= dict(_PARAMETER_CHANGES[change.kind](model, own | new, change, earlier))
    return new


@contextmanager
def parameters_set_to(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """`values` in place of the parameters of those names, within the block."""
    own = dict(model.named_parameters())
    before = {name: own[name].data for name in values}
    try:
        for name, value in values.items():
            own[name].data = value.to(own[name].dtype)
        yield
    finally:
        for name, data in before.items():
            own[name].data = data


Changed = Iterator[tuple[str, torch.Tensor]]
Parameters = Mapping[str, torch.Tensor]


def _sinks(_: nn.Module, own: Parameters, change: Change, __: Any) -> Changed:
    """What is left of the sink's weight in the softmax is 1 - value: its logit is lowered by a logarithm.

    "scaled" multiplies the logit itself by 1 - value.
    """
    for name, value in own.items():
        layer = layer_of(name)
        if name.endswith("sinks") and layer is not None and change.at(layer):
            if change.detail == "scaled":
                yield name, value * (1.0 - change.value)
            else:
                yield name, value + (NO_SINK if change.value >= 1.0 else math.log1p(-change.value))


def _experts(model: nn.Module, own: Parameters, change: Change, _: Any) -> Changed:
    for name, value in own.items():
        layer = layer_of(name)
        if layer is None or not change.at(layer):
            continue
        wrong = _wrong_expert(model, name, value, own, change.detail)
        if wrong is None:
            continue
        if change.experts is not None:
            kept = torch.ones(value.shape[0], dtype=torch.bool)
            kept[list(change.experts)] = False
            wrong = torch.where(kept.view(-1, *[1] * (value.dim() - 1)), value, wrong)
        yield name, torch.lerp(value, wrong.to(value.dtype), change.value)


def _wrong_expert(
    model: nn.Module, name: str, value: torch.Tensor, own: Parameters, detail: str
) -> torch.Tensor | None:
    """The parameter `name` as a converter that mistakes its layout would leave it; None if it is not concerned."""
    if ".gate_proj." in name or ".up_proj." in name:  # a dense block's halves lie in parameters of their own
        other = name.replace(".gate_proj.", ".up_proj.") if ".gate_proj." in name else name.replace(".up_", ".gate_")
        return own[other] if detail == "gate_up_exchanged" else None
    gate_up, down = "experts.gate_up_proj" in name, "experts.down_proj" in name
    if not (gate_up or down):
        return None
    if value.dim() == 3 and detail == "all_transposed":
        return _transposed(value)
    if value.dim() == 3 and detail == ("gate_up_transposed" if gate_up else "down_transposed"):
        return _transposed(value)
    if gate_up and detail in ("gate_up_exchanged", "gate_up_layout"):
        interleaved = str(getattr(model.config, "model_type", "")) == "gpt_oss"
        axis = -1 if interleaved or value.dim() == 2 else 1
        return _exchanged(value, axis, interleaved) if detail.endswith("exchanged") else _laid(value, axis, interleaved)
    return None


def _transposed(value: torch.Tensor) -> torch.Tensor:
    """`[E, a, b]` read as if it lay `[E, b, a]`, in memory of the same size."""
    return value.transpose(1, 2).reshape(value.shape)


def _exchanged(value: torch.Tensor, axis: int, interleaved: bool) -> torch.Tensor:
    if not interleaved:
        return torch.cat(value.chunk(2, dim=axis)[::-1], dim=axis)
    pairs: torch.Tensor = value.unflatten(axis, (-1, 2))
    return pairs.flip(-1).flatten(-2)


def _laid(value: torch.Tensor, axis: int, interleaved: bool) -> torch.Tensor:
    """Gate and up side by side where they belong one after the other, or the other way round."""
    shape = (-1, 2) if interleaved else (2, -1)
    parts: torch.Tensor = value.unflatten(axis, shape)
    first = axis % value.dim()
    return parts.transpose(first, first + 1).flatten(first, first + 1)


def _stale(_: nn.Module, own: Parameters, change: Change, earlier: Sequence[Parameters]) -> Changed:
    """`detail` is "VERSION:GROUP", version an index into `earlier`; an empty group means every tensor."""
    from keel.sync.groups import tensor_groups

    version, group = change.detail.split(":")
    state = earlier[int(version)]
    names = tensor_groups(list(own))[group] if group else list(own)
    for name in names:
        layer = layer_of(name)
        if name in state and (change.layer is None or layer == change.layer):
            yield name, torch.lerp(own[name], state[name].to(own[name]), change.value)


def _rounded(_: nn.Module, own: Parameters, change: Change, __: Any) -> Changed:
    for name, value in own.items():
        yield name, torch.lerp(value, value.to(torch.bfloat16).to(value.dtype), change.value)


_PARAMETER_CHANGES: Mapping[str, Callable[[nn.Module, Parameters, Change, Any], Changed]] = {
    "sinks": _sinks,
    "experts": _experts,
    "stale": _stale,
    "weights_bfloat16": _rounded,
}


@contextmanager
def rope_changed(model: nn.Module, changes: Sequence[Change]) -> Iterator[None]:
    """The rotary module's frequencies and scale computed anew, from a configuration that `changes` alter."""
    wanted = [change for change in changes if change.kind == "rope"]
    rotary: Any = next((module for module in model.modules() if hasattr(module, "inv_freq")), None)
    if not wanted or rotary is None:
        yield
        return
    before = rotary.inv_freq, rotary.attention_scaling
    try:
        frequencies, scale = _rope(copy.deepcopy(model.config), wanted)
        rotary.inv_freq, rotary.attention_scaling = frequencies.to(before[0].device), scale
        yield
    finally:
        rotary.inv_freq, rotary.attention_scaling = before


def _rope(config: Any, changes: Sequence[Change]) -> tuple[torch.Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    numbers = dict(config.rope_parameters)
    attention = divisor = 1.0
    for change in changes:
        if change.detail == "theta":
            numbers["rope_theta"] = float(numbers["rope_theta"]) * change.value
        elif change.detail == "factor":
            numbers["factor"] = float(numbers["factor"]) * change.value
        elif change.detail == "original":
            numbers["original_max_position_embeddings"] = max(
                2, round(numbers["original_max_position_embeddings"] * change.value)
            )
        elif change.detail == "none":
            numbers = {"rope_type": "default", "rope_theta": numbers["rope_theta"]}
        elif change.detail == "linear":
            divisor *= change.value
        else:
            attention *= change.value
    config.rope_parameters = numbers
    if numbers["rope_type"] == "default":
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        frequencies, scale = 1.0 / (float(numbers["rope_theta"]) ** exponents), 1.0
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[numbers["rope_type"]](config, torch.device("cpu"))
    return frequencies / divisor, float(scale) * attention
