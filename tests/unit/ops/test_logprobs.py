"""The chunked head against its float64 twin; bits that must not move; memory that must not grow."""

from __future__ import annotations

import pytest
import torch

from keel.ops.logprobs import head_logits, linear_logprobs, linear_logprobs_reference

TOKENS, HIDDEN, VOCAB = 29, 11, 17


def make(dtype=torch.float64, tokens=TOKENS, *, bias=True):
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": draw(tokens, HIDDEN).requires_grad_(),
        "weight": draw(VOCAB, HIDDEN).requires_grad_(),
        "bias": draw(VOCAB).requires_grad_() if bias else None,
        "labels": torch.randint(0, VOCAB, (tokens,), generator=generator),
        "temperature": torch.rand(tokens, generator=generator) + 0.4,
    }


def split(inputs):
    keywords = {name: inputs[name] for name in ("temperature", "bias")}
    return (inputs["hidden"], inputs["weight"], inputs["labels"]), keywords


@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS, 1000])
@pytest.mark.parametrize("through", ["logprobs", "entropy", "both"])
def test_values_and_gradients_match_the_float64_twin(chunk_tokens, through):
    factors = torch.randn(2, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    results = []
    for twin in (False, True):
        inputs = make()
        positional, keywords = split(inputs)
        if twin:
            logprobs, entropy = linear_logprobs_reference(*positional, **keywords)
        else:
            logprobs, entropy = linear_logprobs(*positional, **keywords, chunk_tokens=chunk_tokens, entropy_grad=True)
        loss = (factors[0] * logprobs).sum() * (through != "entropy") + (factors[1] * entropy).sum() * (
            through != "logprobs"
        )
        loss.backward()
        results.append(
            [logprobs.detach(), entropy.detach(), *(inputs[name].grad for name in ("hidden", "weight", "bias"))]
        )
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_no_temperature_is_temperature_one():
    positional, keywords = split(make(bias=False))
    ones = torch.ones(TOKENS)
    plain, _ = linear_logprobs(*positional)
    assert torch.equal(plain, linear_logprobs(*positional, temperature=ones)[0])
    assert not torch.allclose(plain, linear_logprobs(*positional, temperature=keywords["temperature"])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_with_and_without_gradient(dtype):
    positional, keywords = split(make(dtype))
    logprobs, entropy = linear_logprobs(*positional, **keywords, chunk_tokens=8)
    with torch.no_grad():
        again, entropy_again = linear_logprobs(*positional, **keywords, chunk_tokens=8)
    assert logprobs.dtype == torch.float32
    assert torch.equal(logprobs, again)
    assert torch.equal(entropy, entropy_again)


def test_bfloat16_is_near_the_twin_and_its_gradient_too():
    inputs = make(torch.bfloat16)
    positional, keywords = split(inputs)
    logprobs, _ = linear_logprobs(*positional, **keywords, chunk_tokens=8)
    logprobs.sum().backward()
    ours = inputs["weight"].grad.double()
    twin_inputs = make(torch.bfloat16)
    positional, keywords = split(twin_inputs)
    twin, _ = linear_logprobs_reference(*positional, **keywords)
    twin.sum().backward()
    assert (logprobs - twin).abs().max() < 0.1
    assert (ours - twin_inputs["weight"].grad.double()).norm() / ours.norm() < 0.02


def test_entropy_is_detached_unless_asked_and_absent_if_not_wanted():
    positional, keywords = split(make())
    assert not linear_logprobs(*positional, **keywords)[1].requires_grad
    assert linear_logprobs(*positional, **keywords, with_entropy=False)[1] is None


def test_nothing_saved_for_the_backward_pass_is_as_wide_as_the_vocabulary():
    inputs = make()
    positional, keywords = split(inputs)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        linear_logprobs(*positional, **keywords, chunk_tokens=4)
    assert saved
    assert (TOKENS, VOCAB) not in saved
    assert all(shape[0] != 4 for shape in saved)


def test_head_logits_are_float32_from_bfloat16():
    inputs = make(torch.bfloat16)
    assert head_logits(inputs["hidden"], inputs["weight"], inputs["bias"]).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"got labels \(3,\)"),
        ({"temperature": torch.zeros(TOKENS)}, "must be positive"),
        ({"weight": torch.zeros(VOCAB, HIDDEN + 1, dtype=torch.float64)}, r"needs \[T, Hd\]"),
    ],
)
def test_wrong_inputs_are_refused(change, message):
    positional, keywords = split({**make(), **change})
    with pytest.raises(ValueError, match=message):
        linear_logprobs(*positional, **keywords)


def test_an_empty_micro_batch_is_allowed():
    positional, keywords = split(make(tokens=0))
    logprobs, entropy = linear_logprobs(*positional, **keywords)
    assert logprobs.shape == entropy.shape == (0,)
