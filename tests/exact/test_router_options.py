"""Router options: the load-balancing loss adds up exactly, float32 routers agree on both sides, frozen ones stay."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func as of_gpt_oss
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func as of_qwen3_moe

from benchmarks.routing_replay import sample_groups
from keel.algo.advantage import group_mean
from keel.algo.apply import add_advantages
from keel.algo.load_balance import (
    Balance,
    expert_counts,
    load_balancing_loss,
    load_balancing_loss_reference,
    load_metrics,
)
from keel.batch import pack
from keel.config import (
    AlgoConfig,
    EngineConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RouterConfig,
    Stage,
)
from keel.engines.embedded.engine import EmbeddedEngine
from keel.engines.embedded.load import load_policy
from keel.learner.learner import Learner
from keel.types import SamplingSettings, Verdict

SMALL = {"gpt_oss": {"num_hidden_layers": 2}, "qwen3_moe": {"num_hidden_layers": 2, "mlp_only_layers": []}}
STAGE = Stage("reinforcement", 0, 8, AlgoConfig(), OptimConfig(lr=1e-2))
BALANCED = RouterConfig(aux_loss_coefficient=0.5)


def learner_of(path, learner=None, **model):
    made = Learner(ModelConfig(path=path, **model), learner or LearnerConfig())
    made.enter(STAGE)
    return made


def packed(groups, max_tokens=10_000):
    return add_advantages(pack(groups, max_tokens=max_tokens), group_mean, {})


@pytest.mark.parametrize("theirs", [of_gpt_oss, of_qwen3_moe])
@pytest.mark.parametrize("top_k", [1, 3])
def test_the_loss_of_a_layer_is_that_of_transformers(theirs, top_k):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(37, 3, 8, generator=generator, dtype=torch.float64)
    wanted = torch.stack([theirs((layer,), 8, top_k) for layer in logits.unbind(1)]).mean()
    wanted = wanted.double()  # they count in float32
    torch.testing.assert_close(load_balancing_loss_reference(logits, top_k), wanted, rtol=1e-6, atol=1e-6)
    balance = Balance(1.0, expert_counts(logits.topk(top_k).indices, 8) / 37, 37)
    torch.testing.assert_close(load_balancing_loss(logits, balance), wanted, rtol=1e-6, atol=1e-6)


def test_its_parts_add_up_and_so_do_their_gradients():
    logits = torch.randn(50, 2, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    load_balancing_loss_reference(logits, 2).backward()
    wanted = logits.grad.clone()
    logits.grad = None
    balance = Balance(1.0, expert_counts(logits.topk(2).indices, 6) / 50, 50)
    for part in logits.split([3, 20, 27]):
        load_balancing_loss(part, balance).backward()
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-5, atol=1e-8)


def test_balance_is_the_least_and_one_expert_for_all_the_most():
    even = torch.zeros(8, 1, 4)
    routes = torch.arange(8)[:, None, None] % 4
    assert float(load_balancing_loss(even, Balance(1.0, expert_counts(routes, 4) / 8, 8))) == pytest.approx(1.0)
    all_on_one = torch.tensor([30.0, 0.0, 0.0, 0.0]).expand(8, 1, 4)
    load = expert_counts(torch.zeros(8, 1, 1, dtype=torch.int64), 4)
    assert float(load_balancing_loss(all_on_one, Balance(1.0, load / 8, 8))) == pytest.approx(4.0)
    assert load_metrics(load)["router/load_max_ratio"] == 4.0
    assert (load_metrics(load)["router/dead_experts"], load_metrics(load)["router/load_entropy"]) == (3.0, 0.0)
    found = load_metrics(expert_counts(routes, 4))
    assert found["router/load_entropy"] == pytest.approx(1.0)
    assert (found["router/load_max_ratio"], found["router/dead_experts"]) == (1.0, 0.0)
    assert expert_counts(torch.full((2, 1, 1), -1), 4).sum() == 0


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_of_any_size_have_the_same_loss_and_gradient(tiny_checkpoint, make_groups, preset, checkpointing):
    """And both are those of the whole model's router logits at once, in plain autograd."""
    path, groups = tiny_checkpoint(preset, **SMALL[preset]), make_groups(3, 3)
    found = []
    for max_tokens in (10_000, 60):
        learner = learner_of(path, router=BALANCED, gradient_checkpointing=checkpointing)
        update = learner.backward(packed(groups, max_tokens))
        found.append((update.metrics["router/aux_loss"], update.grad_norm))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][1] != pytest.approx(learner_of(path).backward(packed(groups)).grad_norm, rel=1e-4)
    policy = learner_of(path).policy
    whole = packed(groups).micro_batches[0]
    with torch.no_grad():
        logits = policy(whole, with_router_logits=True).router_logits
    assert found[0][0] == pytest.approx(float(load_balancing_loss_reference(logits, policy.info.top_k)), rel=1e-5)


def test_it_evens_the_load_out(tiny_checkpoint, make_groups):
    path, batch = tiny_checkpoint("gpt_oss", **SMALL["gpt_oss"]), packed(make_groups(3, 3))
    batch = batch.with_micro_batches(
        dataclasses.replace(m, advantages=torch.zeros_like(m.advantages)) for m in batch.micro_batches
    )
    learner, seen = learner_of(path, router=RouterConfig(aux_loss_coefficient=1.0)), []
    with torch.no_grad():
        for router in learner.policy.routers:
            router.bias[0] += 3.0
    learner.optimizer.reset(OptimConfig(lr=1e-3))
    for _ in range(6):
        update = learner.backward(batch)
        learner.apply(update, Verdict())
        seen.append(update.metrics)
    assert seen[-1]["router/aux_loss"] < seen[0]["router/aux_loss"] - 0.1
    assert seen[-1]["router/load_entropy"] > seen[0]["router/load_entropy"]


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3_moe"])
def test_float32_routers_in_a_bfloat16_model_are_the_same_on_both_sides(tiny_checkpoint, preset):
    path = tiny_checkpoint(preset, **SMALL[preset])
    model = ModelConfig(path=path, dtype="bfloat16", router=RouterConfig(dtype="float32"))
    engine = EmbeddedEngine(
        load_policy(model, "cpu"), EngineConfig(slots=32), max_sequence_tokens=160, shares_weights=False
    )
    groups = sample_groups(engine, SamplingSettings(), num_groups=2, num_new=12)
    learner = Learner(model, LearnerConfig(replay_routes="off"))
    learner.enter(STAGE)
    batch = packed(groups)
    outputs = learner.policy(batch.micro_batches[0], with_router_logits=True)
    assert outputs.router_logits.dtype == torch.float32
    assert not torch.equal(outputs.router_logits, outputs.router_logits.bfloat16().float()), "not rounded on the way"
    assert outputs.logprobs.dtype == torch.float32
    update = learner.backward(batch)
    assert update.metrics["mismatch/route_disagreement"] == 0.0
    assert update.metrics["mismatch/abs_max"] < 5e-6
    assert update.grad_norm > 0.0


def test_frozen_routers_stay_and_are_exported(tiny_checkpoint, make_groups, tmp_path):
    path = tiny_checkpoint("gpt_oss", **SMALL["gpt_oss"])
    learner = learner_of(path, router=RouterConfig(frozen=True))
    assert not any("router" in name for name in learner.parameters())
    for _ in range(2):
        learner.apply(learner.backward(packed(make_groups(2, 3))), Verdict())
    learner.export(tmp_path / "out")
    before, after = (load_file(f"{place}/model.safetensors") for place in (path, tmp_path / "out"))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if ".router." in name} <= same
    assert not any("experts" in name or "q_proj" in name for name in same)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    learner.save(tmp_path / "checkpoint", {})
    again = learner_of(path, router=RouterConfig(frozen=True))
    again.load(tmp_path / "checkpoint")
    assert again.backward(packed(make_groups(2, 3))).grad_norm == learner.backward(packed(make_groups(2, 3))).grad_norm


def test_options_of_routers_that_keel_does_not_know_are_refused(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("keel.models.router.DECLARED", {})
    with pytest.raises(ValueError, match="of which 0 by a router that Keel"):
        learner_of(tiny_checkpoint("gpt_oss", **SMALL["gpt_oss"]), router=RouterConfig(frozen=True))


def test_an_adapter_on_the_router_is_part_of_the_loss(tiny_checkpoint, make_groups):
    path = tiny_checkpoint("gpt_oss", **SMALL["gpt_oss"])
    lora = LoraConfig(rank=2, targets=("router",))
    learner = learner_of(path, lora=lora, router=RouterConfig(aux_loss_coefficient=1.0, dtype="float32"))
    batch = packed(make_groups(2, 3))
    silent = batch.with_micro_batches(
        dataclasses.replace(m, advantages=torch.zeros_like(m.advantages)) for m in batch.micro_batches
    )
    first = learner.backward(silent)
    assert first.grad_norm > 0.0
    learner.apply(first, Verdict())
    assert learner.backward(silent).metrics["router/aux_loss"] != first.metrics["router/aux_loss"]
