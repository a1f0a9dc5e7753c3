"""MXFP4 checkpoints against a decoder that reads the format's specification one nibble at a time."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from keel.batch import pack
from keel.config import LoraConfig
from keel.models import mxfp4
from keel.models.policy import PolicyModel
from keel.models.tiny import build_tiny_model

HIDDEN, INTERMEDIATE, LAYERS, EXPERTS = 64, 96, 2, 4
UNQUANTIZED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def e2m1(code: int) -> float:
    """One sign bit, two of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, (code >> 1) & 3, code & 1
    size = 0.5 * mantissa if exponent == 0 else 2.0 ** (exponent - 1) * (1 + 0.5 * mantissa)
    return -size if sign else size


def as_bfloat16(value: float) -> float:
    """What is left of a number in a type that is the upper half of a float32; raises if that is less than all."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    kept = struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]
    assert kept == value, f"{value} is no bfloat16"
    return kept


def slow_decode(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks [E, out, in / 32, 16] and scales [E, out, in / 32], bytes -> [E, in, out], low nibble first."""
    num_experts, num_out, num_blocks, _ = blocks.shape
    result = torch.zeros(num_experts, 32 * num_blocks, num_out, dtype=torch.float64)
    for expert in range(num_experts):
        for row in range(num_out):
            values = []
            pairs = zip(blocks[expert, row].tolist(), scales[expert, row].tolist(), strict=True)
            for codes, scale in pairs:
                for byte in codes:
                    values += [as_bfloat16(e2m1(code) * 2.0 ** (scale - 127)) for code in (byte & 15, byte >> 4)]
            result[expert, :, row] = torch.tensor(values, dtype=torch.float64)
    return result


def write_mxfp4(path: Path) -> dict[str, torch.Tensor]:
    """A small model in the layout of openai/gpt-oss-20b; returns what is in its file."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS}
    build_tiny_model("gpt_oss", path, vocab_size=320, seed=1, num_local_experts=EXPERTS, **sizes)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(path / "model.safetensors").items()}
    draw = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        for name, num_out, num_in in (("gate_up_proj", 2 * INTERMEDIATE, HIDDEN), ("down_proj", HIDDEN, INTERMEDIATE)):
            prefix = f"model.layers.{layer}.mlp.experts.{name}"
            del weights[prefix]
            shape = (EXPERTS, num_out, num_in // 32)
            weights[f"{prefix}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=draw).to(torch.uint8)
            weights[f"{prefix}_scales"] = torch.randint(112, 124, shape, generator=draw).to(torch.uint8)
    # The whole range of the scale, as far as bfloat16 goes; the published files stay far inside.
    extremes = weights["model.layers.1.mlp.experts.down_proj_scales"]
    extremes[0, :, 0] = torch.arange(HIDDEN).to(torch.uint8)
    extremes[0, :, 1] = 251 - torch.arange(HIDDEN).to(torch.uint8)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"modules_to_not_convert": UNQUANTIZED, "quant_method": "mxfp4"}
    config["dtype"] = "bfloat16"
    (path / "config.json").write_text(json.dumps(config))
    return weights


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("mxfp4")
    return path, write_mxfp4(path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_weight_is_what_the_specification_says(quantized, dtype):
    path, stored = quantized
    policy = PolicyModel.load(path, dtype=dtype)
    parameters = dict(policy.model.named_parameters())
    assert {parameter.dtype for parameter in parameters.values()} == {getattr(torch, dtype)}
    assert all(parameter.requires_grad for parameter in parameters.values())
    for layer in range(LAYERS):
        for name in ("gate_up_proj", "down_proj"):
            prefix = f"model.layers.{layer}.mlp.experts.{name}"
            decoded = slow_decode(stored[f"{prefix}_blocks"], stored[f"{prefix}_scales"])
            assert torch.equal(parameters[prefix].detach().double(), decoded)
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.experts.down_proj_bias"):
        assert torch.equal(parameters[name].detach().bfloat16(), stored[name])
    frequencies = [buffer for name, buffer in policy.model.named_buffers() if "inv_freq" in name]
    assert frequencies
    assert {buffer.dtype for buffer in frequencies} == {torch.float32}


@pytest.mark.parametrize("how", ["as it is", "gathered", "merged"])
def test_what_is_saved_is_whole_and_plain_bfloat16(quantized, tmp_path, make_groups, how):
    """Changed weights, as one rank or several hand them over, or an adapter merged into them."""
    lora = LoraConfig(rank=2) if how == "merged" else None
    policy = PolicyModel.load(quantized[0], dtype="bfloat16", lora=lora)
    with torch.no_grad():
        for name, parameter in policy.trained_parameters().items():
            if "lora_B" in name or name.endswith("layers.0.mlp.experts.down_proj"):
                parameter += 1.0
    if how == "merged":
        policy.merge_adapter()
    policy.save(tmp_path, state_dict=policy.model.state_dict() if how == "gathered" else None)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found = dict(again.named_parameters())
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(found[name], parameter), name
    (micro_batch,) = pack(make_groups(1, 2), max_tokens=10_000).micro_batches
    reloaded = PolicyModel.load(tmp_path, dtype="bfloat16")
    with torch.no_grad():
        got, want = reloaded(micro_batch).logprobs, policy(micro_batch).logprobs
    assert torch.equal(got.nan_to_num(), want.nan_to_num())  # the extreme scales overflow in both
    assert bool(torch.isfinite(want).any())


def test_weights_quantized_in_another_way_are_refused(quantized, tmp_path):
    config = json.loads((quantized[0] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantized \(fp8\), which Keel cannot train; use the model's bfloat16"):
        PolicyModel.load(tmp_path)
    assert mxfp4.stored_as(object()) == ""
