"""Kinds of tensors, of the modules that `transformers` makes."""

from __future__ import annotations

import pytest

from keel.models.tiny import build_tiny_model
from keel.sync.groups import group_of, tensor_groups

ATTENTION = {f"attention.{name}_proj" for name in "qkvo"}
NORMS = {"input_layernorm", "post_attention_layernorm", "final_norm"}
EXPERTS = {"experts.gate_up_proj", "experts.down_proj"}
BIASES = {f"{name}.bias" for name in (*ATTENTION, "router")} | {f"{name}_bias" for name in EXPERTS}
QK_NORMS = {"attention.q_norm", "attention.k_norm"}
DENSE = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
EXPECTED = {
    "gpt_oss": ATTENTION | NORMS | EXPERTS | BIASES | {"attention.sinks", "router", "embed", "head"},
    "qwen3": ATTENTION | NORMS | QK_NORMS | DENSE | {"embed"},
    "qwen3_moe": ATTENTION | NORMS | QK_NORMS | EXPERTS | DENSE | {"router", "embed", "head"},
}


@pytest.mark.parametrize("preset", EXPECTED)
def test_every_parameter_is_in_one_group_and_groups_are_kinds(preset: str) -> None:
    model = build_tiny_model(preset, vocab_size=300)
    names = [name for name, _ in model.named_parameters()]
    groups = tensor_groups(names)
    assert set(groups) == EXPECTED[preset]
    assert sorted(name for members in groups.values() for name in members) == sorted(names)
    assert len(groups["attention.q_proj"]) == model.config.num_hidden_layers


def test_factors_are_in_the_group_of_their_weight() -> None:
    layer = "model.layers.12"
    assert group_of(f"{layer}.self_attn.q_proj.lora_A.default.weight") == "attention.q_proj"
    assert group_of(f"{layer}.self_attn.q_proj.base_layer.bias") == "attention.q_proj.bias"
    assert group_of(f"{layer}.mlp.experts.base_layer.lora_B.default.weight") == "experts"
