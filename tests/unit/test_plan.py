"""The plan's numbers against the model itself, loaded and run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from keel.batch import pack
from keel.config import TrainConfig
from keel.config_problems import ConfigError
from keel.models.policy import PolicyModel
from keel.plan import describe_plan, make_plan
from keel.plan_memory import Memory, verdict

PRESETS = ["gpt_oss", "qwen3", "qwen3_moe"]


def config_for(path, **values):
    return TrainConfig.model_validate({"model": {"path": path, **values.pop("model", {})}, **values})


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_counted_exactly(tiny_checkpoint, preset):
    path = tiny_checkpoint(preset)
    model = AutoModelForCausalLM.from_pretrained(path)
    plan = make_plan(config_for(path))
    assert plan.model_type == preset
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_active_parameters_are_those_a_model_with_top_k_experts_has(tiny_checkpoint, preset):
    path = tiny_checkpoint(preset)
    model = AutoModelForCausalLM.from_pretrained(path)
    config = model.config
    moe_layers = sum(name.endswith("experts.down_proj") for name, _ in model.named_parameters())
    router = 0
    for name in ("num_local_experts", "num_experts"):
        if getattr(config, name, None):
            # The same model with only k experts, but the router's rows for all of them.
            dropped = getattr(config, name) - config.num_experts_per_tok
            width = config.hidden_size + (1 if config.model_type == "gpt_oss" else 0)
            router = dropped * width * moe_layers
            setattr(config, name, config.num_experts_per_tok)
            break
    smaller = AutoModelForCausalLM.from_config(config)
    assert make_plan(config_for(path)).active_parameters == sum(p.numel() for p in smaller.parameters()) + router


def test_weights_gradients_and_optimizer_are_counted_exactly(tiny_checkpoint):
    plan = make_plan(config_for(tiny_checkpoint()))
    count = plan.parameters
    memory = plan.memory
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * count, 4 * count, 8 * count)
    assert (memory.reference, memory.engine_weights) == (0, 0)
    plan = make_plan(
        config_for(
            tiny_checkpoint(),
            model={"dtype": "bfloat16"},
            algo={"kl": {"coefficient": 0.1}},
            engine={"process": "separate"},
        )
    )
    memory = plan.memory
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * count, 4 * count, 12 * count)
    assert (memory.reference, memory.engine_weights) == (2 * count, 2 * count)
    assert memory.total == sum(getattr(memory, field.name) for field in dataclasses.fields(memory))


def kept_by_autograd(path, micro_batch, checkpointing):
    """Bytes that autograd really holds after a forward pass, weights left out."""
    policy = PolicyModel.load(path, gradient_checkpointing=checkpointing)
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    kept = {}

    def pack_hook(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        output = policy(micro_batch)
    assert output.logprobs.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_activations_are_estimated_to_a_factor_of_two(tiny_checkpoint, make_groups, preset):
    path = tiny_checkpoint(preset)
    (micro_batch,) = pack(make_groups(8, 4), max_tokens=100_000).micro_batches
    plan = make_plan(config_for(path, batch={"max_tokens": micro_batch.num_tokens}))
    real = kept_by_autograd(path, micro_batch, checkpointing=False)
    assert 0.5 < plan.memory.activations / real < 2.0, (plan.memory.activations, real)


def test_checkpointing_is_planned_to_need_less(tiny_checkpoint):
    path = tiny_checkpoint()
    whole = make_plan(config_for(path)).memory.activations
    assert make_plan(config_for(path, model={"gradient_checkpointing": True})).memory.activations < whole


def test_a_step_is_bounded_by_every_episode_at_its_longest(tiny_checkpoint):
    rollout = {"groups_per_step": 3, "group_size": 5, "max_turns": 2, "max_new_tokens": 40, "max_sequence_tokens": 200}
    plan = make_plan(config_for(tiny_checkpoint(), rollout=rollout, batch={"max_tokens": 700}))
    assert (plan.episodes_per_step, plan.tokens_per_step, plan.policy_tokens_per_step) == (15, 3000, 1200)
    assert plan.micro_batches_per_step == 5


def test_a_model_made_for_the_run_is_planned_without_making_it():
    tiny = {"tiny": {"preset": "gpt_oss", "vocab_size": 400, "options": {"num_hidden_layers": 3}}}
    shallow = make_plan(TrainConfig.model_validate({"model": tiny}))
    tiny["tiny"]["options"]["num_hidden_layers"] = 4
    assert shallow.parameters < make_plan(TrainConfig.model_validate({"model": tiny})).parameters


def test_a_path_without_a_model_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path"):
        make_plan(config_for(str(tmp_path)))


def test_the_text_tells_stages_and_invariants(tiny_checkpoint):
    values = {"warm_start": {"steps": 7}, "steps": 9, "eval": {"num_tasks": 11, "every": 3}}
    text = describe_plan(make_plan(config_for(tiny_checkpoint(), **values)))
    stages = [line.split(maxsplit=2)[2] for line in text.splitlines() if line.startswith("stage")]
    assert [stage.split()[0] for stage in stages] == ["evaluate", "warm", "evaluate", "reinforcement:", "evaluate"]
    assert "policy/ratio_max_dev is exactly 0" in text
    several = describe_plan(make_plan(config_for(tiny_checkpoint(), algo={"updates_per_batch": 2})))
    assert "policy/ratio_max_dev is exactly 0" not in several


def test_memory_given_back_counts_once(tiny_checkpoint):
    plan = make_plan(config_for(tiny_checkpoint(), engine={"slots": 4, "free_cache": "on"}))
    memory = plan.memory
    learning = memory.gradients + memory.activations + memory.head
    assert plan.peak_bytes == memory.weights + memory.optimizer + max(learning, memory.key_values)
    assert make_plan(config_for(tiny_checkpoint(), engine={"slots": 4})).peak_bytes == memory.total  # on the CPU: off


def test_the_fullest_card_holds_its_share_and_the_engine():
    memory = Memory(80, 40, 160, 0, activations=10, head=6, key_values=20, engine_weights=80)
    assert memory.peak(ranks=4, on_card=True, frees_cache=False) == 20 + 10 + 40 + 10 + 6 + 20 + 80
    assert memory.peak(ranks=4, on_card=True, frees_cache=True) == 20 + 40 + 80 + max(10 + 10 + 6, 20)
    assert memory.peak(ranks=4, on_card=False, frees_cache=False) == 80 + 40 + 160 + 4 * (10 + 6) + 20 + 80


SMALL = {"batch": {"max_tokens": 16}, "engine": {"slots": 1}, "rollout": {"max_sequence_tokens": 512}}
"""A batch so small that the weights are most of it."""


@pytest.mark.parametrize(
    ("values", "knob"),
    [
        (SMALL, "lora.rank = 32"),
        ({**SMALL, "model": {"lora": {"rank": 4}}}, 'model.dtype = "bfloat16"'),
        (
            {"model": {"dtype": "bfloat16", "lora": {"rank": 4}}, "batch": {"max_tokens": 10**6}},
            "gradient_checkpointing",
        ),
        ({"model": {"dtype": "bfloat16", "lora": {"rank": 4}}, "engine": {"slots": 10**6}}, "lower engine.slots"),
        (
            {
                "model": {"dtype": "bfloat16", "lora": {"rank": 4}, "gradient_checkpointing": True},
                "batch": {"max_tokens": 10**7},
                "engine": {"slots": 1},
            },
            "lower batch.max_tokens",
        ),
    ],
)
def test_what_does_not_fit_names_the_option_that_saves_most(tiny_checkpoint, values, knob):
    config = config_for(tiny_checkpoint(), **values)
    plan = make_plan(config)
    told = verdict(config, plan.memory, plan.peak_bytes, plan.peak_bytes // 2)
    assert told.startswith("does not fit in ")
    assert knob in told
    assert verdict(config, plan.memory, plan.peak_bytes, 2 * plan.peak_bytes).startswith("fits in ")
    assert plan.device == "cpu"


def test_weights_that_are_too_large_by_themselves_are_told_so():
    config = TrainConfig.model_validate({"model": {"dtype": "bfloat16", "lora": {"rank": 4}}})
    memory = Memory(10**12, 0, 0, 0, 0, 0, 0, 0)
    assert "take a smaller model" in verdict(config, memory, memory.total, 80 * 2**30)
    assert verdict(config, memory, 60 * 2**30, None) == "fits a card of 80 GiB"
    assert "does not fit any usual card" in verdict(config, memory, memory.total, None)


def test_a_model_with_code_of_its_own_is_refused_and_the_code_not_run(tmp_path, tiny_checkpoint, monkeypatch):
    marker = tmp_path / "was run"
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import PretrainedConfig as C, PreTrainedModel as M\n"
    for name in ("configuration_strange.py", "modeling_strange.py"):
        (tmp_path / name).write_text(code, encoding="utf-8")
    auto_map = {"AutoConfig": "configuration_strange.C", "AutoModelForCausalLM": "modeling_strange.M"}
    values = {"model_type": "strange", "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"code of its own, which is not run[^$]*model\.trust_remote_code = true"):
        make_plan(config_for(str(tmp_path)))
    with pytest.raises(ValueError, match="custom code"):
        PolicyModel.load(tmp_path)
    assert not marker.exists()
    # A known architecture is built from transformers' own code, whatever lies beside it.
    values = json.loads(Path(tiny_checkpoint("qwen3"), "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**values, "auto_map": auto_map}), encoding="utf-8")
    assert make_plan(config_for(str(tmp_path))).model_type == "qwen3"
    assert not marker.exists()
