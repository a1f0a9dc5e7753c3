"""`PolicyModel`: what it refuses, what it reports, and that sequences packed together do not see each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from keel.batch import MicroBatch
from keel.config import ModelConfig
from keel.models import attention as keel_attention
from keel.models.info import count_parameters, load_info
from keel.models.policy import PolicyModel
from keel.models.tiny import build_tiny_model

VOCAB = 300


def make_micro_batch(lengths=(9, 20, 14)) -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    return MicroBatch(
        input_ids=torch.randint(0, VOCAB, (total,), generator=generator),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        labels=torch.randint(0, VOCAB, (total,), generator=generator),
        loss_mask=torch.ones(total, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        sequence_to_trajectory=torch.arange(len(lengths)),
        policy_version=torch.zeros(total, dtype=torch.int32),
        temperature=torch.ones(total),
        turn=torch.zeros(total, dtype=torch.int32),
        max_seqlen=max(lengths),
    )


@pytest.fixture(scope="module", params=["gpt_oss", "qwen3", "qwen3_moe"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    build_tiny_model(request.param, path, vocab_size=VOCAB, seed=1)
    return path


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt_oss_only")
    build_tiny_model("gpt_oss", path, vocab_size=VOCAB, seed=1)
    return path


def test_loads_from_the_model_section_of_a_config(directory):
    section = ModelConfig(path=str(directory), dtype="bfloat16", gradient_checkpointing=True, head_chunk_tokens=7)
    policy = PolicyModel.load(**dict(section.model_dump(exclude={"tiny"}), lora=section.lora, router=section.router))
    assert policy.head.weight.dtype == torch.bfloat16
    assert policy.training
    assert policy.head_chunk_tokens == 7
    assert policy(make_micro_batch()).logprobs.dtype == torch.float32


def test_info_is_known_without_weights(directory):
    policy = PolicyModel.load(directory)
    assert load_info(directory) == policy.info
    assert count_parameters(directory) == sum(parameter.numel() for parameter in policy.parameters())
    assert policy.info.num_moe_layers == len(policy.routers)


def test_info_of_the_families(gpt_oss):
    info = load_info(gpt_oss)
    assert info.layer_windows == (32, None, 32, None)
    assert (info.num_experts, info.top_k, info.num_moe_layers) == (6, 2, 4)
    assert (info.num_heads, info.num_kv_heads, info.head_dim, info.hidden_size) == (6, 2, 32, 128)


def test_neighbours_in_a_pack_change_nothing_but_rounding(directory):
    policy, batch = PolicyModel.load(directory, dtype="float64"), make_micro_batch()
    ids = batch.input_ids.clone()
    ids[:9] = ids[:9].flip(0)
    with torch.no_grad():
        before = policy(batch).logprobs
        after = policy(dataclasses.replace(batch, input_ids=ids)).logprobs
    assert not torch.allclose(before[:9], after[:9])
    torch.testing.assert_close(before[9:], after[9:], rtol=0, atol=1e-12)


def test_recording_changes_no_bit(gpt_oss):
    policy, batch = PolicyModel.load(gpt_oss), make_micro_batch()
    plain = policy(batch)
    recorded = policy(batch, with_routes=True, with_margins=True)
    assert torch.equal(plain.logprobs, recorded.logprobs)
    assert plain.routes is None
    assert plain.route_margins is None
    assert recorded.routes.shape == (batch.num_tokens, 4, 2)
    assert recorded.route_margins.shape == (batch.num_tokens, 4)
    assert policy(batch, with_routes=True).route_margins is None


def test_recording_survives_recomputation(gpt_oss):
    batch = make_micro_batch()
    stored = PolicyModel.load(gpt_oss)(batch, with_routes=True)
    outputs = PolicyModel.load(gpt_oss, gradient_checkpointing=True)(batch, with_routes=True)
    kept = outputs.routes.clone()
    outputs.logprobs.sum().backward()
    assert torch.equal(outputs.routes, kept)
    assert torch.equal(stored.routes, kept)


def test_entropy_carries_a_gradient_only_if_asked(gpt_oss):
    policy, batch = PolicyModel.load(gpt_oss), make_micro_batch()
    assert not policy(batch).entropy.requires_grad
    assert policy(batch, entropy_grad=True).entropy.requires_grad
    assert policy(batch, with_entropy=False).entropy is None


def test_a_head_in_float32_rounds_no_logit_on_either_side(directory):
    """A bfloat16 model: what engine and learner take the log-probs from has float32's bits."""
    batch = make_micro_batch((12, 7))
    policies = {
        head_dtype: PolicyModel.load(directory, dtype="bfloat16", head_dtype=head_dtype)
        for head_dtype in ("model", "float32")
    }
    with torch.no_grad():
        hidden = torch.randn(5, policies["model"].head.in_features).bfloat16()
        rounded, whole = (policy.logits(hidden) for policy in policies.values())
        found = {head_dtype: policy(batch).logprobs for head_dtype, policy in policies.items()}
    expected = hidden.double() @ policies["model"].head.weight.double().t()
    assert (whole - expected).abs().max() < 1e-5
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(found["float32"], found["model"])
    assert (found["float32"] - found["model"]).abs().max() < 0.1


def test_logits_of_the_trunk_give_the_same_logprobs(directory):
    policy, batch = PolicyModel.load(directory), make_micro_batch((12,))
    with torch.no_grad():
        hidden, routes = policy.trunk(batch.input_ids, batch.positions, cu_seq_lens_q=batch.cu_seqlens, max_length_q=12)
        logits = policy.logits(hidden)
    assert routes is None
    expected = torch.log_softmax(logits, -1).gather(1, batch.labels[:, None])[:, 0]
    assert torch.equal(expected, policy(batch).logprobs.detach())


def test_save_takes_weights_from_a_state_dict(tmp_path, directory):
    policy, batch = PolicyModel.load(directory), make_micro_batch()
    doubled = {name: 2 * tensor for name, tensor in policy.model.state_dict().items()}
    policy.save(tmp_path, state_dict=doubled)
    loaded = PolicyModel.load(tmp_path)
    assert torch.equal(loaded.head.weight, 2 * policy.head.weight)
    assert not torch.equal(loaded(batch).logprobs, policy(batch).logprobs)


def test_state_dict_names_are_those_of_transformers(directory):
    policy = PolicyModel.load(directory)
    assert {f"model.{name}" for name in policy.model.state_dict()} == set(policy.state_dict())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_that_would_mix_packed_sequences_is_refused(tmp_path, attention):
    build_tiny_model("qwen3", tmp_path, vocab_size=VOCAB)
    policy = PolicyModel.load(tmp_path, attention=attention)
    with pytest.raises(ValueError, match="let see each other; set attention = 'keel'"):
        policy(make_micro_batch())
    assert policy(make_micro_batch((12,))).logprobs.shape == (12,)


def test_a_dense_model_has_no_routes(tmp_path):
    build_tiny_model("qwen3", tmp_path, vocab_size=VOCAB)
    outputs = PolicyModel.load(tmp_path)(make_micro_batch(), with_routes=True, with_margins=True)
    assert outputs.routes is None
    assert outputs.route_margins is None


def test_routers_that_are_not_declared_still_train_but_have_no_routes():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=VOCAB, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, **sizes)
    keel_attention.register()
    policy = PolicyModel(MixtralForCausalLM._from_config(config, attn_implementation="keel"))
    policy(make_micro_batch()).logprobs.sum().backward()
    with pytest.raises(ValueError, match="1 MoE layers, of which 0 have a router"):
        policy(make_micro_batch(), with_routes=True)


def test_unknown_dtype_and_unusual_heads_are_refused(tmp_path, gpt_oss):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    with pytest.raises(ValueError, match="known: float32, bfloat16"):
        PolicyModel.load(gpt_oss, dtype="float8")
    config = Gemma2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        PolicyModel.load(tmp_path)
