"""Adapters: where they are put, what they add, and that PEFT itself reads the same numbers out of the same files."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from keel.config import LoraConfig
from keel.models.adapter_files import AdapterError, base_model
from keel.models.lora import count_adapter_parameters
from keel.models.policy import PolicyModel
from tests.unit.models.test_policy import make_micro_batch

PRESETS = ("gpt_oss", "qwen3", "qwen3_moe")
RANK_4 = LoraConfig(rank=4, alpha=6)
EXPECTED = {
    "gpt_oss": ("attention", "experts", "router"),
    "qwen3": ("attention", "mlp"),
    "qwen3_moe": ("attention", "experts", "router"),  # the dense layer stays as it is
}


@pytest.fixture(scope="module")
def directory(tiny_checkpoint):
    return lambda preset: tiny_checkpoint(preset, num_hidden_layers=2)


def adapted(path, *, seed=3, lora=RANK_4, **options):
    """A policy whose adapter has learned something, made up."""
    policy = PolicyModel.load(path, lora=lora, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return policy


def outputs(policy):
    out = policy(make_micro_batch(), with_routes=True)
    return [out.logprobs, out.entropy] + ([] if out.routes is None else [out.routes])


def same(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_and_one_switched_off_are_the_base_to_the_bit(directory, preset, dtype):
    base = outputs(PolicyModel.load(directory(preset), dtype=dtype))
    fresh = PolicyModel.load(directory(preset), dtype=dtype, lora=RANK_4)
    assert same(outputs(fresh), base)
    learned = adapted(directory(preset), dtype=dtype)
    on = outputs(learned)
    assert not torch.equal(on[0], base[0])
    with learned.without_adapter():
        off = outputs(learned)
    assert same(off, base)
    assert not off[0].requires_grad
    assert same(outputs(learned), on)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_adapter_alone_is_trained_and_is_where_it_should_be(directory, preset):
    policy = PolicyModel.load(directory(preset), dtype="bfloat16", lora=RANK_4)
    assert policy.adapter.targets == EXPECTED[preset]
    trained = policy.trained_parameters()
    assert all("lora_" in name and parameter.dtype == torch.bfloat16 for name, parameter in trained.items())
    assert {name for name, parameter in policy.model.named_parameters() if "lora_" in name} == set(trained)
    numbers = sum(parameter.numel() for parameter in trained.values())
    assert numbers == count_adapter_parameters(directory(preset), RANK_4)
    outputs(policy)[0].sum().backward()
    assert {name for name, parameter in policy.model.named_parameters() if parameter.grad is not None} == set(trained)
    alone = PolicyModel.load(directory(preset), lora=LoraConfig(rank=2, targets=("attention",)))
    assert alone.adapter.targets == ("attention",)
    assert all(".self_attn." in name for name in alone.trained_parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_plain_peft_computes_the_same_values_and_gradients_from_the_saved_adapter(directory, preset, tmp_path):
    policy = adapted(directory(preset))
    policy.save(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(directory(preset), attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing keys
        theirs = PeftModel.from_pretrained(plain, str(tmp_path), is_trainable=True)
    batch = make_micro_batch((30,))
    logits = theirs(batch.input_ids[None]).logits[0]
    expected = torch.log_softmax(logits, -1).gather(-1, batch.labels[:, None])[:, 0]
    ours = policy(batch).logprobs
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(30, generator=torch.Generator().manual_seed(0))
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = {name.replace("base_model.model.", "", 1): p.grad for name, p in theirs.named_parameters()}
    trained = policy.trained_parameters()
    assert trained
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5, msg=name)
    # Merged by PEFT: another order of rounding, the same numbers.
    merged = theirs.merge_and_unload()(batch.input_ids[None]).logits[0].log_softmax(-1)
    torch.testing.assert_close(ours, merged.gather(-1, batch.labels[:, None])[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_saved_adapter_comes_back_to_the_bit(directory, preset, tmp_path):
    policy = adapted(directory(preset), dtype="bfloat16")
    policy.save(tmp_path / "one")
    policy.save(tmp_path / "two")
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == directory(preset)
    assert base_model(tmp_path / "one") == (directory(preset), "")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert {file.name for file in (tmp_path / "one").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    found = PolicyModel.load(tmp_path / "one", dtype="bfloat16")
    assert found.adapter.rank == 4
    assert found.adapter.targets == EXPECTED[preset]
    assert same(outputs(found), outputs(policy))
    assert set(found.trained_parameters()) == set(policy.trained_parameters())
    assert same(outputs(PolicyModel.load(tmp_path / "one", dtype="bfloat16", lora=RANK_4)), outputs(policy))


def test_an_adapter_written_by_peft_on_some_projections_is_read(directory, tmp_path):
    """q and v but not k, as many do; Keel makes the three in one product."""
    model = AutoModelForCausalLM.from_pretrained(directory("gpt_oss"), attn_implementation="eager")
    config = PeftLoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], use_rslora=True)
    theirs = get_peft_model(model, config)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    batch = make_micro_batch((30,))
    expected = theirs(batch.input_ids[None]).logits[0].log_softmax(-1).gather(-1, batch.labels[:, None])[:, 0]
    policy = PolicyModel.load(tmp_path)
    torch.testing.assert_close(policy(batch).logprobs, expected, rtol=1e-5, atol=1e-5)
    assert policy.adapter.targets == ("attention",)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointing_gives_the_same_bits(directory, preset, dtype):
    gradients = []
    for checkpointing in (False, True):
        policy = adapted(directory(preset), dtype=dtype, gradient_checkpointing=checkpointing)
        out = policy(make_micro_batch())
        out.logprobs.sum().backward()
        gradients.append([out.logprobs, *(p.grad for p in policy.trained_parameters().values())])
    assert same(*gradients)


def test_what_cannot_be_had_is_refused_with_the_way_out(directory, tmp_path):
    with pytest.raises(AdapterError, match=r"qwen3 has no experts; it has attention, mlp: leave the others out"):
        PolicyModel.load(directory("qwen3"), lora=LoraConfig(rank=2, targets=("attention", "experts")))
    with pytest.raises(AdapterError, match=r"needs model\.experts = 'keel', got 'eager'"):
        PolicyModel.load(directory("gpt_oss"), experts="eager", lora=RANK_4)
    assert PolicyModel.load(
        directory("gpt_oss"), experts="eager", lora=LoraConfig(rank=2, targets=("attention", "router"))
    ).adapter.targets == ("attention", "router")
    with pytest.raises(AdapterError, match="has no adapter to switch off"):
        PolicyModel.load(directory("qwen3")).without_adapter()


def test_an_adapter_that_does_not_fit_is_refused(directory, tmp_path):
    adapted(directory("qwen3")).save(tmp_path)
    for other, name in ((LoraConfig(rank=8, alpha=6), "rank"), (LoraConfig(rank=4, alpha=7), "alpha")):
        with pytest.raises(AdapterError, match=f"another {name} than model.lora asks for"):
            PolicyModel.load(tmp_path, lora=other)
    with pytest.raises(AdapterError, match=r"it has attention, mlp, asked is mlp; set model.lora.targets"):
        PolicyModel.load(tmp_path, lora=LoraConfig(rank=4, alpha=6, targets=("mlp",)))
    change(tmp_path, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(AdapterError, match="there is no such directory; put the base model back"):
        PolicyModel.load(tmp_path)
    change(tmp_path, base_model_name_or_path=None)
    with pytest.raises(AdapterError, match="base_model_name_or_path is None"):
        PolicyModel.load(tmp_path)
    change(tmp_path, base_model_name_or_path=directory("gpt_oss"))
    with pytest.raises(AdapterError, match="does not fit"):
        PolicyModel.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="cannot be read"):
        PolicyModel.load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "use_dora = True"),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, "bias = 'lora_only'"),
        ({"target_modules": ["q_proj"], "lora_dropout": 0.1}, "lora_dropout = 0.1"),
        ({"target_modules": ["lm_head"]}, "lm_head has an adapter, which Keel would not run"),
        ({"target_modules": ["embed_tokens"]}, "an adapter of the kind Embedding"),
    ],
)
def test_peft_features_that_keel_would_not_run_are_refused(directory, tmp_path, options, message):
    model = AutoModelForCausalLM.from_pretrained(directory("gpt_oss"))
    get_peft_model(model, PeftLoraConfig(r=2, **options)).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=message):
        PolicyModel.load(tmp_path)


def test_a_lost_or_foreign_weights_file_is_told(directory, tmp_path):
    adapted(directory("qwen3")).save(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="is not there; an adapter's directory needs it"):
        PolicyModel.load(tmp_path / "a")
    change(tmp_path / "b", r=5)
    with pytest.raises(AdapterError, match="names or shapes differ"):
        PolicyModel.load(tmp_path / "b")


def change(path, **values):
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
