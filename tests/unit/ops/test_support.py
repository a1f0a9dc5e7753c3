"""Log-probs over what a cut left: against the dense twin, against an engine's draws, and what own cut differs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from keel.engines.embedded.sampling import draw
from keel.ops.logprobs import linear_logprobs, linear_logprobs_reference
from keel.ops.support import TokenSupport, cut_logits, differs_from_own_cut, own_cut

TOKENS, HIDDEN, VOCAB = 23, 11, 17


def make(dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight, bias = normal(TOKENS, HIDDEN), normal(VOCAB, HIDDEN), normal(VOCAB)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    rows = []
    for t, label in enumerate(labels.tolist()):  # sizes from none (nothing cut) over one (the label alone) to all
        size = (0, 1, 2, 5, VOCAB)[t % 5]
        others = [v for v in torch.randperm(VOCAB, generator=generator).tolist() if v != label]
        rows.append([*others[: size - 1], label] if size else [])
    offsets = torch.tensor([0, *np.cumsum([len(row) for row in rows])])
    support = TokenSupport(torch.tensor([v for row in rows for v in row], dtype=torch.int32), offsets)
    temperature = torch.rand(TOKENS, generator=generator) + 0.4
    return (hidden, weight, labels), {"bias": bias, "temperature": temperature, "support": support}


@pytest.mark.parametrize("vocabulary_tile", [1, 4, VOCAB])
@pytest.mark.parametrize("chunk_tokens", [1, 6, 1000])
def test_values_and_gradients_match_the_dense_float64_twin(chunk_tokens, vocabulary_tile):
    factors = torch.randn(2, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    results = []
    for twin in (False, True):
        positional, keywords = make()
        leaves = [positional[0].requires_grad_(), positional[1].requires_grad_(), keywords["bias"].requires_grad_()]
        if twin:
            logprobs, entropy = linear_logprobs_reference(*positional, **keywords)
        else:
            tiles = {"chunk_tokens": chunk_tokens, "vocabulary_tile": vocabulary_tile}
            logprobs, entropy = linear_logprobs(*positional, **keywords, **tiles, entropy_grad=True)
        (factors[0] * logprobs + factors[1] * entropy).sum().backward()
        results.append([logprobs.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    assert abs(results[0][0][1]) + abs(results[0][1][1]) < 1e-15, "alone in its support: certain"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_and_without_gradient_and_without_a_cut(dtype):
    positional, keywords = make(dtype)
    with_gradient = linear_logprobs(positional[0].requires_grad_(), *positional[1:], **keywords, chunk_tokens=4)[0]
    with torch.no_grad():
        without = linear_logprobs(*positional, **keywords, chunk_tokens=4)[0]
        plain = linear_logprobs(*positional, **{**keywords, "support": None}, chunk_tokens=4)[0]
    assert torch.equal(with_gradient, without)
    uncut = keywords["support"].offsets.diff() == 0
    assert torch.equal(without[uncut], plain[uncut])
    assert (without >= plain).all()


def test_wrong_supports_are_refused():
    positional, keywords = make()
    support = keywords["support"]
    for wrong, message in (
        (TokenSupport(support.ids, support.offsets[:-1]), "needs \\[24\\] offsets"),
        (TokenSupport(support.ids[:-1], support.offsets), "needs \\[24\\] offsets"),
        (TokenSupport(support.ids + 3, support.offsets), "in a vocabulary of 17"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_logprobs(*positional, **{**keywords, "support": wrong})


SETTINGS = [(0.7, 20, 0.9), (1.0, 0, 0.5), (1.3, 3, 1.0), (0.3, 50, 0.99), (2.0, 0, 0.999), (1.0, 5000, 0.8)]


def drawn(setting, num_rows=64, vocabulary=101):
    temperature, top_k, top_p = setting
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(num_rows, vocabulary, generator=generator)
    logits[0, :7] = logits[0].max() + 1  # ties at the top
    uniform = np.random.default_rng(0).random(num_rows)
    columns = [np.full(num_rows, value) for value in (temperature, top_k, top_p)]
    draws = draw(logits, *columns, uniform, range(num_rows))
    rows = [draws.support[row] for row in range(num_rows)]
    offsets = torch.tensor([0, *np.cumsum([len(row) for row in rows])])
    support = TokenSupport(torch.from_numpy(np.concatenate(rows)).int(), offsets)
    limits = torch.full((num_rows,), top_k), torch.full((num_rows,), top_p, dtype=torch.float64)
    return logits / temperature, draws, support, limits


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_log_prob_of_a_draw_is_that_over_its_support(setting):
    scaled, draws, support, _ = drawn(setting)
    left = torch.log_softmax(cut_logits(scaled.double().clone(), support, 0), dim=-1)
    found = left.gather(-1, torch.from_numpy(draws.tokens)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(found, draws.logprobs, rtol=0, atol=1e-6)
    assert np.isfinite(found).all(), "the drawn token is always in its support"


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_cut_made_again_is_the_engines_and_is_seen_where_it_is_not(setting):
    scaled, draws, support, (top_k, top_p) = drawn(setting)
    labels = torch.from_numpy(draws.tokens)
    _, inside = support.inside(0, len(scaled), scaled.shape[1])
    again = own_cut(scaled, top_k, top_p, labels)
    assert torch.equal(again, inside)
    assert not differs_from_own_cut(scaled, support, 0, top_k, top_p).any()
    for change in ("more", "fewer", "other"):
        for row in range(1, 12):
            wrong = inside[row].clone()
            ranked = scaled[row].argsort(descending=True)
            size = int(wrong.sum())
            if change != "fewer":
                wrong[ranked[min(size + (change == "other"), len(ranked) - 1)]] = True
            if change != "more":
                wrong[ranked[size - 1]] = False
            if size == len(ranked) or not wrong.any():
                continue
            one = TokenSupport(wrong.nonzero()[:, 0].int(), torch.tensor([0, int(wrong.sum())]))
            rows = slice(row, row + 1)
            assert differs_from_own_cut(scaled[rows], one, 0, top_k[rows], top_p[rows]).all(), (change, row)


def test_a_label_is_forced_into_an_own_cut():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    inside = own_cut(logits, torch.tensor([2]), torch.tensor([1.0]), torch.tensor([3]))
    assert inside.tolist() == [[True, True, False, True]]
