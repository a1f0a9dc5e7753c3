"""Kinds of tensors: one name for what is the same in every layer, so that what is wrong can be named in a few words."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What a name starts with, up to the layer's number; and words that say nothing about the kind.
_PREFIX = re.compile(r"^(?:base_model\.)?(?:model\.)*(?:layers\.\d+\.)?")
_ADAPTER = re.compile(r"\.lora_[AB]\.[^.]+")
_WHOLE = {"embed_tokens": "embed", "lm_head": "head", "norm": "final_norm"}
_PARTS = {"self_attn": "attention", "gate": "router"}
_SILENT = {"weight", "base_layer", "mlp"}


def tensor_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """`names` of parameters (as `module.named_parameters()` has them), sorted into groups in order of first appearance.

    A group is one kind of tensor over all layers: `attention.sinks`, `attention.q_proj`, `attention.q_proj.bias`,
    `experts.gate_up_proj`, `experts.gate_up_proj_bias`, `mlp.gate_proj`, `router`, `router.bias`, `input_layernorm`,
    `final_norm`, `embed`, `head`, ... The factors of an adapter belong to the group of the weight that they are on.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(group_of(name), []).append(name)
    return groups


def group_of(name: str) -> str:
    """The group of one parameter.

    >>> group_of("model.layers.3.self_attn.q_proj.bias"), group_of("model.layers.0.mlp.gate.weight")
    ('attention.q_proj.bias', 'router')
    """
    bare = _ADAPTER.sub("", name)
    parts = _PREFIX.sub("", bare).split(".")
    if parts[0] in _WHOLE and "layers." not in bare:
        return ".".join([_WHOLE[parts[0]], *[part for part in parts[1:] if part not in _SILENT]])
    inside_mlp = parts[0] == "mlp" and parts[1:2] not in (["experts"], ["router"], ["gate"])
    kept = [_PARTS.get(part, part) for part in parts if part not in _SILENT]
    return ".".join(["mlp", *kept] if inside_mlp else kept)
