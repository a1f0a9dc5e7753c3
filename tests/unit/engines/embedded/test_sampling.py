"""Draws against exact probabilities and `transformers`' own logits warpers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from keel.engines.embedded.sampling import Draws, draw, logprobs_of, seed_state, uniforms


def settings(rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> tuple[np.ndarray, ...]:
    return np.full(rows, temperature), np.full(rows, top_k, dtype=np.int64), np.full(rows, top_p)


def draw_many(logits: torch.Tensor, count: int, seed: int, **options: float) -> Draws:
    """`count` draws from one row of logits, as positions 0, 1, ... of one stream."""
    uniform = uniforms(np.full(count, seed_state(seed), dtype=np.uint64), np.arange(count))
    return draw(logits.expand(count, -1), *settings(count, **options), uniform)


def warped(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """The distribution after `transformers`' own warpers, float64."""
    scores = logits.double()[None]
    for warper in (
        *([TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []),
        *([TopKLogitsWarper(top_k)] if top_k else []),
        *([TopPLogitsWarper(top_p)] if top_p < 1.0 else []),
    ):
        scores = warper(None, scores)
    return torch.softmax(scores[0], dim=-1)


CUTS = [
    {},
    {"temperature": 0.7},
    {"top_k": 7},
    {"top_p": 0.8},
    {"temperature": 1.4, "top_k": 12, "top_p": 0.9},
    {"temperature": 0.3, "top_p": 0.05},
]


@pytest.mark.parametrize("options", CUTS)
def test_frequencies_fit_the_exact_distribution(options: dict[str, float]) -> None:
    logits = torch.randn(23, generator=torch.Generator().manual_seed(3)) * 1.5
    exact = warped(logits, **options).numpy()
    count = 20_000
    draws = draw_many(logits, count, seed=11, **options)
    observed = np.bincount(draws.tokens, minlength=23)
    possible = exact > 0
    assert observed[~possible].sum() == 0
    chi_square = float((((observed - count * exact) ** 2)[possible] / (count * exact[possible])).sum())
    degrees = int(possible.sum()) - 1
    # Wilson and Hilferty's cube-root approximation of the 99.99 % quantile.
    limit = degrees * (1 - 2 / (9 * max(degrees, 1)) + 3.72 * (2 / (9 * max(degrees, 1))) ** 0.5) ** 3
    assert chi_square <= max(limit, 1e-12)
    np.testing.assert_allclose(draws.logprobs, np.log(exact[draws.tokens]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", CUTS)
@pytest.mark.parametrize("vocab_size", [2, 17, 403])
def test_every_token_that_the_warpers_leave_can_be_drawn_and_no_other(
    options: dict[str, float], vocab_size: int
) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    for _ in range(5):
        logits = torch.randn(vocab_size, generator=generator) * 3
        grid = (np.arange(4096) + 0.5) / 4096
        draws = draw(logits.expand(4096, -1), *settings(4096, **options), grid)
        exact = warped(logits, **options).numpy()
        drawn = np.unique(draws.tokens)
        assert (exact[drawn] > 0).all()
        assert set(np.flatnonzero(exact > 2 / 4096)) <= set(drawn.tolist())
        np.testing.assert_allclose(draws.logprobs, np.log(exact[draws.tokens]), rtol=0, atol=1e-12)


def test_greedy_takes_the_first_of_the_largest_with_log_prob_zero() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0]] * 2)
    draws = draw(logits, *settings(2, temperature=0.0, top_k=1), np.array([2.0**-52, 1 - 2.0**-52]))
    assert draws.tokens.tolist() == [1, 1]
    assert draws.logprobs.tolist() == [0.0, 0.0]


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    generator = torch.Generator().manual_seed(5)
    rows = 67
    logits = torch.randn(rows, 101, generator=generator) * 4
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64).numpy()
    temperature = np.array([1.0, 0.0, 0.6, 1.7] * 17)[:rows]
    top_k = np.array([0, 5, 0, 3, 9] * 14)[:rows]
    top_p = np.array([1.0, 0.9, 0.3] * 23)[:rows]
    everything = draw(logits, temperature, top_k, top_p, uniform)
    for row in range(rows):
        here = slice(row, row + 1)
        alone = draw(logits[here], temperature[here], top_k[here], top_p[here], uniform[here])
        assert alone.tokens[0] == everything.tokens[row]
        assert alone.logprobs[0] == everything.logprobs[row]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_reported_for_their_row_only(bad: float) -> None:
    logits = torch.zeros(4, 9)
    logits[2, 5] = bad
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}):
        draws = draw(logits, *settings(4, **options), np.full(4, 0.3))
        assert draws.finite.tolist() == [True, True, False, True]


def test_the_ends_of_the_unit_interval_give_tokens_that_exist() -> None:
    logits = torch.tensor([[-200.0, 0.0, 1.0, -200.0]] * 2)
    for options in ({}, {"top_k": 3}, {"top_p": 0.99}):
        draws = draw(logits, *settings(2, **options), np.array([2.0**-52, 1 - 2.0**-52]))
        assert set(draws.tokens.tolist()) == {1, 2}


def test_uniforms_are_made_of_seed_and_position_alone_and_look_uniform() -> None:
    seeds = [0, 1, 2, -1, 2**63, 12345678901234567890123]
    states = np.array([seed_state(seed) for seed in seeds], dtype=np.uint64)
    assert len(set(states.tolist())) == len(seeds)
    table = np.array([uniforms(np.full(4096, state, dtype=np.uint64), np.arange(4096)) for state in states])
    assert ((table > 0) & (table < 1)).all()
    assert (table * 2**52 % 2 == 1).all()
    assert np.array_equal(uniforms(states, np.full(len(seeds), 77)), table[:, 77])
    assert len(np.unique(table)) == table.size
    # Means within five standard errors, and neither neighbours in a stream nor streams of near seeds are correlated.
    assert (abs(table.mean(axis=1) - 0.5) < 5 / np.sqrt(12 * 4096)).all()
    correlation = np.corrcoef(np.vstack([table, np.roll(table[0], 1)])) - np.eye(len(seeds) + 1)
    assert abs(correlation).max() < 5 / np.sqrt(4096)


def test_the_stream_is_splitmix64() -> None:
    """First outputs of splitmix64 from state 1234567, published with xoshiro's reference code."""
    state = np.uint64(1234567)
    got = [uniforms(np.array([state]), np.array([position]))[0] for position in range(3)]
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert got == [((value >> 13) + 0.5) * 2.0**-51 for value in published]


def test_scored_log_probs_reach_where_probabilities_are_zero() -> None:
    logits = torch.tensor([[0.0, -2000.0]])
    assert logprobs_of(logits, torch.tensor([1])).tolist() == [-2000.0]
