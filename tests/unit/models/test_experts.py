"""Registration of Keel's experts with `transformers`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from keel.models.experts import check, experts_layout, register, row_invariant_experts
from keel.models.tiny import tiny_config
from keel.ops.experts import ExpertsLayout
from keel.ops.experts_tiles import TILE_ROWS


def make_experts(preset, implementation="keel"):
    register()
    config = tiny_config(preset, vocab_size=300)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    return next(module for module in model.modules() if hasattr(module, "is_transposed"))


def make_inputs(module, tokens=50):
    generator = torch.Generator().manual_seed(0)
    hidden_size = module.down_proj.shape[2 if module.is_transposed else 1]
    hidden = torch.randn(tokens, hidden_size, generator=generator)
    scores = torch.rand(tokens, module.num_experts, generator=generator)
    weights, chosen = torch.topk(scores, 2, dim=-1)
    return hidden, chosen, weights


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3_moe"])
def test_registered_experts_equal_the_eager_ones(preset):
    ours, eager = make_experts(preset), make_experts(preset, "eager")
    inputs = make_inputs(ours)
    assert ours.config._experts_implementation == "keel"
    torch.testing.assert_close(ours(*inputs), eager(*inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3_moe"])
def test_the_row_invariant_variant_is_switched_on_by_context(preset):
    module = make_experts(preset)
    hidden, chosen, weights = make_inputs(module, TILE_ROWS + 3)
    with row_invariant_experts():
        whole = module(hidden, chosen, weights)
        alone = module(hidden[-1:], chosen[-1:], weights[-1:])
    assert torch.equal(whole[-1:], alone)
    assert not whole.requires_grad
    assert module(hidden, chosen, weights).requires_grad, "the context must end"


def test_layouts_are_read_from_the_modules():
    assert experts_layout(make_experts("gpt_oss")) == ExpertsLayout(
        transposed=True, interleaved=True, alpha=1.702, offset=1.0, limit=7.0
    )
    assert experts_layout(make_experts("qwen3_moe")) == ExpertsLayout()


def test_an_unknown_gate_is_refused_before_any_work():
    module = make_experts("qwen3_moe")
    module.act_fn = nn.GELU()
    with pytest.raises(NotImplementedError, match="set experts = 'grouped_mm'"):
        check(nn.Sequential(module))
