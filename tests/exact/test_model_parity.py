"""A whole `PolicyModel` against plain `transformers`: eager experts, its own attention, sequence by sequence, float64.

The reference's attention is "eager" for GPT-OSS. For the Qwen families it is "sdpa": their eager attention takes its
softmax in float32 whatever the model's type.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from keel.batch import MicroBatch
from keel.models.policy import PolicyModel
from keel.models.router import replay_routes
from keel.models.tiny import PRESETS, build_tiny_model, build_tiny_tokenizer

VOCAB = 391
LENGTHS = (37, 70, 5, 1, 48)
MOE = ("gpt_oss", "qwen3_moe")


def make_micro_batch(lengths=LENGTHS, seed=0) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return MicroBatch(
        input_ids=torch.randint(0, VOCAB, (total,), generator=generator),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        labels=torch.randint(0, VOCAB, (total,), generator=generator),
        loss_mask=torch.ones(total, dtype=torch.bool),
        cu_seqlens=bounds.to(torch.int32),
        sequence_to_trajectory=torch.arange(len(lengths)),
        policy_version=torch.zeros(total, dtype=torch.int32),
        temperature=torch.rand(total, generator=generator) + 0.5,
        turn=torch.zeros(total, dtype=torch.int32),
        max_seqlen=max(lengths),
    )


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    paths = {}
    for preset in PRESETS:
        paths[preset] = tmp_path_factory.mktemp(preset)
        build_tiny_model(preset, paths[preset], vocab_size=VOCAB, seed=3)
    return paths


def plain_model(path, preset, dtype=torch.float64):
    experts = {"experts_implementation": "eager"} if preset in MOE else {}
    attention = "eager" if preset == "gpt_oss" else "sdpa"
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention, **experts)


def plain_logprobs(model, batch: MicroBatch) -> torch.Tensor:
    """Log-probs of the labels, each sequence run alone."""
    parts = []
    for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        logits = model(input_ids=batch.input_ids[None, start:stop]).logits[0]
        log_p = torch.log_softmax(logits / batch.temperature[start:stop, None].to(logits.dtype), dim=-1)
        parts.append(log_p.gather(1, batch.labels[start:stop, None])[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_packed_logprobs_and_gradients_equal_plain_transformers(directories, preset, checkpointing):
    batch = make_micro_batch()
    plain = plain_model(directories[preset], preset)
    policy = PolicyModel.load(directories[preset], dtype="float64", gradient_checkpointing=checkpointing)
    factors = torch.randn(batch.num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    expected = plain_logprobs(plain, batch)
    (expected * factors).sum().backward()
    outputs = policy(batch)
    (outputs.logprobs * factors).sum().backward()

    torch.testing.assert_close(outputs.logprobs, expected, rtol=0, atol=1e-10)
    wanted = dict(plain.named_parameters())
    ours = dict(policy.model.named_parameters())
    assert ours.keys() == wanted.keys()
    for name, parameter in ours.items():
        scale = wanted[name].grad.abs().max()
        assert scale > 0, f"{name} has no gradient: the test would not see it dropped"
        assert (parameter.grad - wanted[name].grad).abs().max() <= 1e-10 * scale, name


@pytest.mark.parametrize("preset", PRESETS)
def test_float32_stays_near_plain_transformers_in_float64(directories, preset):
    batch = make_micro_batch()
    with torch.no_grad():
        expected = plain_logprobs(plain_model(directories[preset], preset), batch)
        ours = PolicyModel.load(directories[preset])(batch).logprobs
    assert (ours - expected).abs().max() < 2e-5


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_pass_has_the_same_bits(directories, preset, dtype):
    """With gradient, without, with checkpointing: equal to the bit, and so are the gradients."""
    batch = make_micro_batch((60, 41, 70))
    results, gradients = [], []
    for checkpointing in (False, True):
        policy = PolicyModel.load(directories[preset], dtype=dtype, gradient_checkpointing=checkpointing)
        with torch.no_grad():
            results.append(policy(batch).logprobs)
        logprobs = policy(batch).logprobs
        results.append(logprobs.detach())
        logprobs.sum().backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.parametrize("preset", MOE)
def test_routes_are_those_of_plain_transformers(directories, preset):
    batch = make_micro_batch((29,))
    plain = plain_model(directories[preset], preset)
    with torch.no_grad():
        logits = plain(input_ids=batch.input_ids[None], output_router_logits=True).router_logits
        outputs = PolicyModel.load(directories[preset], dtype="float64")(batch, with_routes=True, with_margins=True)
    top = [torch.topk(layer, outputs.routes.shape[-1] + 1, dim=-1) for layer in logits]
    expected = torch.stack([layer.indices[:, :-1] for layer in top], dim=1)
    assert outputs.routes.dtype == torch.int32
    assert torch.equal(outputs.routes, expected.to(torch.int32))
    margins = torch.stack([layer.values[:, -2] - layer.values[:, -1] for layer in top], dim=1).float()
    torch.testing.assert_close(outputs.route_margins, margins, rtol=0, atol=1e-6)


@pytest.mark.parametrize("preset", MOE)
def test_replayed_routes_are_obeyed_and_survive_recomputation(directories, preset):
    batch = make_micro_batch((29, 33))
    gradients = []
    for checkpointing in (False, True):
        policy = PolicyModel.load(directories[preset], dtype="float64", gradient_checkpointing=checkpointing)
        own = policy(batch, with_routes=True)
        forced = (own.routes + 1) % policy.info.num_experts
        with replay_routes(forced):
            replayed = policy(batch, with_routes=True)
        assert torch.equal(replayed.routes, forced)
        assert not torch.allclose(replayed.logprobs, own.logprobs)
        replayed.logprobs.sum().backward()  # outside the context: recomputation must replay by itself
        gradients.append([parameter.grad for parameter in policy.parameters()])
        with replay_routes(own.routes):
            assert torch.equal(policy(batch).logprobs, own.logprobs)
        with replay_routes(torch.full_like(forced, -1)):
            assert torch.equal(policy(batch).logprobs, own.logprobs)
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_an_exported_checkpoint_gives_plain_transformers_the_same_greedy_continuation(tmp_path, directories, preset):
    tokenizer = build_tiny_tokenizer(["12 + 30 = 42, the sum"] * 9, 391, style="harmony")
    policy = PolicyModel.load(directories[preset])
    with torch.no_grad():  # a trained model is not the one it was loaded from
        for parameter in policy.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    policy.save(tmp_path, tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert plain.config.tie_word_embeddings == policy.info.tied_embeddings
    assert not any("keel" in text for text in (tmp_path / "config.json").read_text().split())

    prompt = make_micro_batch((40,)).input_ids
    continued = plain.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[0]
    ours = prompt
    with torch.no_grad():
        for _ in range(24):
            bounds = torch.tensor([0, len(ours)], dtype=torch.int32)
            hidden, _ = policy.trunk(ours, torch.arange(len(ours)), cu_seq_lens_q=bounds, max_length_q=len(ours))
            ours = torch.cat([ours, policy.logits(hidden[-1:]).argmax(-1)])
    assert ours.tolist() == continued.tolist()
