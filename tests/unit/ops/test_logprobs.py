"""The chunked head against its float64 twin; bits that must not move; memory that must not grow."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


TILES = pytest.mark.parametrize("vocabulary_tile", [1, 5, VOCAB], ids=["a word", "ragged tiles", "whole rows"])


@TILES
@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS, 1000])
@pytest.mark.parametrize("through", ["logprobs", "entropy", "both"])
def test_values_and_gradients_match_the_float64_twin(chunk_tokens, through, vocabulary_tile):
    factors = torch.randn(2, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    results = []
    for twin in (False, True):
        inputs = make()
        positional, keywords = split(inputs)
        if twin:
            logprobs, entropy = linear_logprobs_reference(*positional, **keywords)
        else:
            tiles = {"chunk_tokens": chunk_tokens, "vocabulary_tile": vocabulary_tile}
            logprobs, entropy = linear_logprobs(*positional, **keywords, **tiles, entropy_grad=True)
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


@pytest.mark.parametrize("order", ["falling", "rising"])
def test_logits_far_apart_from_tile_to_tile_overflow_nothing(order):
    """A running maximum that moves by hundreds from one tile to the next, both ways."""
    levels = torch.linspace(600.0, -600.0, VOCAB, dtype=torch.float64)
    weight = (levels if order == "falling" else levels.flip(0))[:, None].requires_grad_()
    hidden, labels = torch.ones(VOCAB, 1, dtype=torch.float64, requires_grad=True), torch.arange(VOCAB)
    results = []
    for run, options in (
        (linear_logprobs, {"vocabulary_tile": 3, "entropy_grad": True}),
        (linear_logprobs_reference, {}),
    ):
        weight.grad = None
        logprobs, entropy = run(hidden, weight, labels, **options)
        (logprobs + entropy).sum().backward()
        results.append([logprobs.detach(), entropy.detach(), weight.grad])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vocabulary_tile", [5, VOCAB])
def test_float32_products_round_no_logit_to_bfloat16(vocabulary_tile):
    positional, keywords = split(make(torch.bfloat16))
    twin, _ = linear_logprobs_reference(*positional, **keywords)
    gaps = []
    for wide in (False, True):
        options = {"vocabulary_tile": vocabulary_tile, "float32_products": wide}
        logprobs, _ = linear_logprobs(*positional, **keywords, **options)
        gaps.append(float((logprobs - twin).detach().abs().max()))
        (grad,) = torch.autograd.grad(logprobs.sum(), positional[1])
        assert grad.dtype == torch.bfloat16
    (reference,) = torch.autograd.grad(twin.sum(), positional[1])
    assert gaps[1] < 1e-5 < 1e-3 < gaps[0]
    torch.testing.assert_close(grad, reference.to(torch.bfloat16), rtol=2**-7, atol=1e-6)


@TILES
def test_a_head_that_learns_nothing_costs_no_gradient(vocabulary_tile):
    inputs = make(bias=False)
    positional, keywords = split(inputs)
    linear_logprobs(*positional, **keywords, vocabulary_tile=vocabulary_tile)[0].sum().backward()
    expected = inputs["hidden"].grad
    inputs = make(bias=False)
    inputs["weight"].requires_grad_(False)
    positional, keywords = split(inputs)
    linear_logprobs(*positional, **keywords, vocabulary_tile=vocabulary_tile)[0].sum().backward()
    assert inputs["weight"].grad is None
    assert torch.equal(inputs["hidden"].grad, expected)


@TILES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_with_and_without_gradient(dtype, vocabulary_tile):
    positional, keywords = split(make(dtype))
    keywords |= {"chunk_tokens": 8, "vocabulary_tile": vocabulary_tile}
    logprobs, entropy = linear_logprobs(*positional, **keywords)
    with torch.no_grad():
        again, entropy_again = linear_logprobs(*positional, **keywords)
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


class LargestMade(TorchDispatchMode):
    """The most numbers that any operation's result has, those of the wanted shapes apart."""

    def __init__(self, *wanted):
        super().__init__()
        self.wanted, self.largest = wanted, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and tuple(made.shape) not in self.wanted and not made._is_view():
            self.largest = max(self.largest, made.numel())
        return made


def test_nothing_that_is_made_grows_with_the_vocabulary():
    tokens, hidden_size, chunk, tile = 40, 6, 10, 30
    found = []
    for vocabulary in (300, 3000):
        hidden = torch.randn(tokens, hidden_size, requires_grad=True)
        weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
        labels = torch.arange(tokens)
        with LargestMade((vocabulary, hidden_size)) as made:
            options = {"chunk_tokens": chunk, "vocabulary_tile": tile, "entropy_grad": True}
            logprobs, entropy = linear_logprobs(hidden, weight, labels, **options)
            (logprobs + entropy).sum().backward()
        found.append(made.largest)
    assert found == [chunk * tile, chunk * tile]


def test_an_output_is_freed_without_a_garbage_collector():
    positional, keywords = split(make())
    gc.disable()
    try:
        output, _ = linear_logprobs(*positional, **keywords)
        watched = weakref.ref(output)
        del output, _
        assert watched() is None
    finally:
        gc.enable()


def test_head_logits_are_float32_from_bfloat16():
    inputs = make(torch.bfloat16)
    assert head_logits(inputs["hidden"], inputs["weight"], inputs["bias"]).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"got labels \(3,\)"),
        ({"temperature": torch.zeros(TOKENS)}, "must be positive"),
        ({"chunk_tokens": 0}, "start at 1"),
        ({"vocabulary_tile": 0}, "start at 1"),
        ({"weight": torch.zeros(VOCAB, HIDDEN + 1, dtype=torch.float64)}, r"needs \[T, Hd\]"),
    ],
)
def test_wrong_inputs_are_refused(change, message):
    positional, keywords = split({**make(), **change})
    keywords |= {name: value for name, value in change.items() if isinstance(value, int)}
    with pytest.raises(ValueError, match=message):
        linear_logprobs(*positional, **keywords)


def test_an_empty_micro_batch_is_allowed():
    positional, keywords = split(make(tokens=0))
    logprobs, entropy = linear_logprobs(*positional, **keywords)
    assert logprobs.shape == entropy.shape == (0,)
