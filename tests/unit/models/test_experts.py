"""Registration of Keel's experts with `transformers`."""

from __future__ import annotations

import importlib

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


class AnyConfig:
    """Sizes for any family's experts module, whatever names it asks for them by."""

    _experts_implementation = "eager"

    def __getattr__(self, name):
        rules = (
            ("act", "silu"),
            ("limit", 0.4),
            ("alpha", 1.3),
            ("intermediate", 10),
            ("shared", 0),
            ("expert", 5),
            ("hidden", 12),
        )
        found = [value for part, value in rules if part in name]
        if not found:
            raise AttributeError(name)
        return found[0]


FAMILIES = {
    "gpt_oss": "GptOssExperts",
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",
    "minimax_m3_vl": "MiniMaxM3VLExperts",
    "deepseek_v4": "DeepseekV4Experts",
    "hy_v4": "HYV4Experts",
    "glm5_next": "Glm5NextTextExperts",
    "aria": "AriaExperts",
    "mixtral": "MixtralExperts",
    "qwen2_moe": "Qwen2MoeExperts",
    "qwen3_moe": "Qwen3MoeExperts",
    "qwen3_next": "Qwen3NextExperts",
    "olmoe": "OlmoeExperts",
    "deepseek_v3": "DeepseekV3Experts",
    "glm4_moe": "Glm4MoeExperts",
    "granitemoe": "GraniteMoeExperts",
    "lfm2_moe": "Lfm2MoeExperts",
    "minimax_m2": "MiniMaxM2Experts",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_the_family(family):
    """Against the family's own code in float64, with gates beyond every clamp."""
    register()
    code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    module = getattr(code, FAMILIES[family])(AnyConfig()).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    hidden = torch.randn(23, 12, dtype=torch.float64, generator=generator).requires_grad_()
    shares, chosen = torch.rand(23, 5, dtype=torch.float64, generator=generator).topk(2, dim=-1)
    leaves = [hidden, shares.requires_grad_(), *module.parameters()]
    results = []
    for implementation in ("eager", "keel"):
        module.config._experts_implementation = implementation
        out = module(hidden, chosen, shares)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    precise = 1e-5 if family == "openai_privacy_filter" else 1e-12  # its own code adds up in float32
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=precise, atol=precise)


def test_experts_spread_over_processes_are_refused():
    module = make_experts("qwen3_moe")
    module._is_expert_parallel = True
    with pytest.raises(NotImplementedError, match="expert parallelism"):
        check(nn.Sequential(module))
