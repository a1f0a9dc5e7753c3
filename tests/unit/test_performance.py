"""Tokens per second and the share of a device's arithmetic, and the operations they are made of."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from keel.config import TrainConfig
from keel.models.flops import FlopCount
from keel.models.policy import PolicyModel
from keel.performance import Peak, peak_of, peak_of_card, performance
from tests.unit.models.test_padding import make_micro_batch

ROW = {"learner/tokens": 3000.0, "learner/tflop": 6.0, "time/learn_s": 2.0}


@pytest.mark.parametrize(("preset", "options"), [("qwen3", {}), ("qwen3", {"tie_word_embeddings": False})])
def test_operations_of_a_dense_model_are_those_that_torch_counts(tiny_checkpoint, preset, options):
    """torch counts every product of a plain pass; its attention is dense, so the keys of a triangle are added here."""
    policy = PolicyModel.load(tiny_checkpoint(preset, num_hidden_layers=2, **options), attention="eager")
    tokens = torch.randint(0, 300, (1, 64))
    with FlopCounterMode(display=False) as counter:
        policy.model(tokens, use_cache=False).logits.sum().backward()
    count = FlopCount.of(policy.model, policy.info)
    ours = count.training(torch.arange(64))
    hidden = 3 * count.key_cost * 2 * (64 * 64 - 64 * 65 // 2)  # of two layers, forward and backward
    assert counter.get_total_flops() == pytest.approx(ours + hidden, rel=0.02)


def test_only_experts_that_run_and_keys_in_the_window_count(tiny_checkpoint):
    policy = PolicyModel.load(tiny_checkpoint("gpt_oss", num_hidden_layers=2, sliding_window=9))
    info = policy.info
    count = FlopCount.of(policy.model, info)
    sizes = {name: p.numel() for name, p in policy.model.named_parameters()}
    experts = sum(n for name, n in sizes.items() if name.endswith(("experts.gate_up_proj", "experts.down_proj")))
    others = sum(n for name, n in sizes.items() if name.endswith(("_proj.weight", "router.weight", "lm_head.weight")))
    assert count.weights == count.trained == others + experts * info.top_k / info.num_experts
    keys = sum(min(place + 1, 9) + place + 1 for place in range(30))
    expected = 6 * count.weights * 30 + 3 * 4 * info.num_heads * info.head_dim * keys
    assert count.training(torch.arange(30)) == pytest.approx(expected)


def test_weights_that_do_not_learn_take_no_gradient_of_their_own(tiny_checkpoint):
    policy = PolicyModel.load(tiny_checkpoint("qwen3", num_hidden_layers=2))
    whole = FlopCount.of(policy.model, policy.info)
    policy.requires_grad_(False)
    frozen = FlopCount.of(policy.model, policy.info)
    difference = whole.training(torch.arange(5)) - frozen.training(torch.arange(5))
    assert difference == pytest.approx(5 * 2 * whole.weights)


def test_a_step_that_shares_computes_less_and_feeds_as_much(tiny_checkpoint):
    policy = PolicyModel.load(tiny_checkpoint("qwen3", num_hidden_layers=2))
    batch = make_micro_batch((20, 20))
    twice = batch.input_ids.clone()
    twice[20:] = twice[:20]
    outputs = policy(dataclasses.replace(batch, input_ids=twice), share_prefixes="on")
    assert outputs.computed.tolist() == list(range(20))
    assert policy(batch, share_prefixes="on").computed is None


def test_figures_of_a_row():
    config = TrainConfig()
    told = performance(ROW, config, Peak(12.0, "given"))
    assert told == {"perf/tokens_per_s": 1500.0, "perf/mfu": 0.25}
    assert performance(ROW, config, Peak(None, "unknown"))["perf/mfu"] is None
    assert performance({"time/learn_s": 1.0}, config, Peak(1.0, "given")) == {}


def test_a_peak_is_given_measured_or_known_and_else_says_why():
    given = TrainConfig(learner={"peak_tflops": 3.5})
    assert peak_of(given) == Peak(3.5, "learner.peak_tflops")
    measured = peak_of(TrainConfig(device="cpu"))
    assert measured.tflops > 0.001
    assert measured.source.startswith("measured")
    assert peak_of_card("NVIDIA H200", "bfloat16").tflops == peak_of_card("NVIDIA H100 80GB HBM3", "bfloat16").tflops
    assert peak_of_card("NVIDIA H100 PCIe", "bfloat16").tflops < 800
    for unknown in (peak_of_card("NVIDIA H200", "float32"), peak_of_card("A card of next year", "bfloat16")):
        assert unknown.tflops is None
        assert "learner.peak_tflops" in unknown.source
