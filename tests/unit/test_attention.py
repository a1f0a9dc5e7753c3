"""The public face: what `explain` says is what the layers do."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3Config

import keel.attention
from keel.ops.attention import AttentionBackendError

SIZES = {
    "vocab_size": 83,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_hidden_layers": 2,
}


def gpt_oss(implementation: str) -> torch.nn.Module:
    made = GptOssConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2, sliding_window=7)
    return AutoModelForCausalLM.from_config(made, attn_implementation=implementation)


def test_keel_layers_are_explained_one_by_one() -> None:
    keel.attention.register()
    layers = keel.attention.explain(gpt_oss("keel")).layers
    assert [(layer.layer, layer.backend, layer.window, layer.sinks) for layer in layers] == [
        (0, "cpu", 7, "exact"),
        (1, "cpu", None, "exact"),
    ]
    assert "flash" in layers[0].reason


def test_a_model_without_sinks_and_other_implementations() -> None:
    keel.attention.register()
    qwen = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES), attn_implementation="keel")
    assert {layer.sinks for layer in keel.attention.explain(qwen).layers} == {"none"}
    assert {layer.sinks for layer in keel.attention.explain(gpt_oss("eager")).layers} == {"exact"}
    text = str(keel.attention.explain(gpt_oss("eager")))
    assert "layer 0: eager -> eager" in text
    assert "sinks exact" in text


def test_sdpa_is_said_to_drop_sinks() -> None:
    model = gpt_oss("eager")
    model.config._attn_implementation = "sdpa"
    assert {layer.sinks for layer in keel.attention.explain(model).layers} == {"dropped"}


def test_a_backend_is_asked_for_by_name_and_really_used() -> None:
    """The dense twin and the kernel differ in the last bits of float32; "blocks" in other bits again."""
    keel.attention.register()
    torch.manual_seed(0)
    model, ids = gpt_oss("keel"), torch.arange(40)[None]
    outs, names = {}, ("auto", "cpu", "blocks", "reference")
    try:
        for name in names:
            keel.attention.register(name)
            keel.attention.register()  # changes nothing
            assert {layer.backend for layer in keel.attention.explain(model).layers} == {
                "cpu" if name == "auto" else name
            }
            outs[name] = model(ids).logits
        keel.attention.register("flash_attn_2")
        assert "on cuda, the tensors are" in keel.attention.explain(model).layers[0].reason
        with pytest.raises(AttentionBackendError, match="'flash_attn_2' cannot be used"):
            model(ids)
    finally:
        keel.attention.register("auto")
    assert torch.equal(outs["auto"], outs["cpu"])
    assert not torch.equal(outs["cpu"], outs["blocks"])
    assert not torch.equal(outs["reference"], outs["blocks"])
    for name in names:
        assert (outs[name] - outs["reference"]).abs().max() < 1e-5
    with pytest.raises(AttentionBackendError, match="unknown attention backend 'flash'"):
        keel.attention.register("flash")


def test_why_a_backend_was_chosen_is_told() -> None:
    keel.attention.register()
    text = str(keel.attention.explain(gpt_oss("keel").to(torch.float16)))
    assert "keel -> cpu (torch's stock CPU flash kernel, chosen automatically for float16 on cpu, heads of 10" in text


def test_a_device_without_a_backend_is_named() -> None:
    keel.attention.register()
    layer = keel.attention.explain(gpt_oss("keel").to("meta")).layers[0]
    assert layer.backend == "none"
    assert "no backend for tensors on meta" in layer.reason


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="no attention layer found in Linear"):
        keel.attention.explain(torch.nn.Linear(2, 3))
