"""Drawing one token per row: softmax(logits / temperature), cut to top-k, then to top-p, by inverse CDF.

Everything is done in float64, and only by kernels that treat a row alike wherever it lies: softmax, cumulative sums,
sorting and searching run row by row. (torch's element-wise sigmoid was measured to give other last bits in the
unvectorized tail of a buffer; such a function of a flattened buffer would make a draw depend on its slot.)
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np
import torch

_GAMMA = 0x9E3779B97F4A7C15
_MASK = 0xFFFFFFFFFFFFFFFF
_SEED_SALT = 0xD1B54A32D192ED03


@dataclass(frozen=True, slots=True)
class Draws:
    """One row per row of logits; `finite` is False where a logit was not (the other two then mean nothing)."""

    tokens: np.ndarray  # [R] int64
    logprobs: np.ndarray  # [R] float64, under the distribution drawn from
    finite: np.ndarray  # [R] bool
    support: Mapping[int, np.ndarray]  # of rows where it was wanted: ids [n], likeliest first

    def of_rows(self, rows: np.ndarray, num_rows: int) -> Draws:
        """The same as draws of `rows [R]` out of `num_rows`; the others drew nothing."""
        tokens, logprobs = np.zeros(num_rows, dtype=np.int64), np.zeros(num_rows)
        finite = np.zeros(num_rows, dtype=np.bool_)
        tokens[rows], logprobs[rows], finite[rows] = self.tokens, self.logprobs, self.finite
        return Draws(tokens, logprobs, finite, {int(rows[index]): ids for index, ids in self.support.items()})


def seed_state(seed: int) -> int:
    """The 64-bit stream key of a request's seed (any Python integer; equal modulo 2^64 means equal)."""
    return _mix_int((seed & _MASK) ^ _SEED_SALT)


def uniforms(seed_states: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Uniform numbers strictly inside (0, 1), odd multiples of 2^-52, made of (seed, position) alone.

    `seed_states [R]` uint64 from `seed_state`, `positions [R]` integer, the token's place in its sequence. Counter-
    based: the finalizer of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014) at
    step `position` of the stream that the seed picks. Nothing is remembered between draws.
    """
    counter = positions.astype(np.uint64) + np.uint64(1)
    mixed = _mix(seed_states + counter * np.uint64(_GAMMA))
    return ((mixed >> np.uint64(13)).astype(np.float64) + 0.5) * 2.0**-51


def draw(
    logits: torch.Tensor,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    uniform: np.ndarray,
    support_rows: Container[int] = (),
    *,
    exact: bool = False,
) -> Draws:
    """Draw a token for every row of `logits [R, V]`; the settings and `uniform` are `[R]`.

    Of `support_rows` it is told what top-k and top-p left to choose from, if they cut anything.

    Temperature 0 takes the most likely token (the first of equals) with log-prob 0. Like the usual warpers: top-k keeps
    every token that ties with the k-th; top-p keeps the most likely tokens up to and including the one with which
    their share reaches top_p, of what top-k left; then probabilities are made to sum to one again.
    With `exact`, log-probs are made as the learner makes them, in the type of `logits`, to the bit.
    """
    device = logits.device
    greedy = temperature == 0.0
    scale = torch.from_numpy(np.where(greedy, 1.0, temperature)).to(device)
    scaled = logits.to(torch.float64)
    if (scale != 1.0).any():  # dividing by one changes nothing and costs as much as all the rest
        scaled /= scale[:, None]
    threshold = torch.from_numpy(uniform).to(device)
    tokens, shares = _draw_whole(scaled, threshold)
    support: dict[int, np.ndarray] = {}
    left_out = torch.zeros((), dtype=torch.bool)
    cut = np.flatnonzero(~greedy & ((top_p < 1.0) | ((top_k > 0) & (top_k < logits.shape[1]))))
    if cut.size:
        rows = torch.from_numpy(cut).to(device)
        limits = (torch.from_numpy(top_k[cut]).to(device), torch.from_numpy(top_p[cut]).to(device))
        order, weights = _cut(scaled[rows], *limits)
        place, shares[rows] = _invert(weights, threshold[rows])
        tokens[rows] = order.gather(-1, place[:, None]).squeeze(-1)
        left_out = torch.ones_like(weights, dtype=torch.bool).scatter_(-1, order, weights <= 0)
        wanted = [index for index, row in enumerate(cut.tolist()) if row in support_rows]
        support = {int(cut[index]): order[index][weights[index] > 0].cpu().numpy() for index in wanted}
    if greedy.any():
        rows = torch.from_numpy(np.flatnonzero(greedy)).to(device)
        tokens[rows], shares[rows] = scaled[rows].argmax(dim=-1), 1.0
    finite = torch.isfinite(logits.sum(dim=-1))
    if not exact:
        return Draws(tokens.cpu().numpy(), _logs(shares), finite.cpu().numpy(), support)
    narrow = logits / scale[:, None].to(logits.dtype)
    for index, row in enumerate(cut.tolist()):
        narrow[row, left_out[index]] = float("-inf")
    logprobs = torch.log_softmax(narrow, dim=-1).gather(-1, tokens[:, None])[:, 0]
    logprobs = logprobs.masked_fill_(torch.from_numpy(greedy).to(device), 0.0)
    return Draws(tokens.cpu().numpy(), logprobs.double().cpu().numpy(), finite.cpu().numpy(), support)


def logprobs_of(logits: torch.Tensor, labels: torch.Tensor, *, exact: bool = False) -> np.ndarray:
    """Log-probs `[R]` at temperature 1 of `labels [R]` under `logits [R, V]`, float64; with `exact` as the learner's.

    A label too unlikely for a float64 probability is still right: it is never drawn, but may be scored.
    """
    logprobs = torch.log_softmax(logits if exact else logits.to(torch.float64), dim=-1).gather(-1, labels[:, None])
    values: np.ndarray = logprobs.squeeze(-1).double().cpu().numpy()
    return values


def _logs(shares: torch.Tensor) -> np.ndarray:
    """Logarithms one by one: a vectorized logarithm may differ between the body and the tail of a buffer."""
    return np.array([math.log(share) if share > 0.0 else -math.inf for share in shares.tolist()])


def _draw_whole(scaled: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nothing is cut: tokens in the order of the vocabulary."""
    return _invert(torch.softmax(scaled, dim=-1), uniform)


def _cut(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in falling order of probability `[R, V]`, and their probabilities, 0 for the tail that is cut off."""
    vocabulary = scaled.shape[-1]
    ordered, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
    kept = torch.where(top_k > 0, top_k, vocabulary).clamp(max=vocabulary)
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, kept[:, None] - 1), float("-inf"))
    probabilities = torch.softmax(ordered, dim=-1)
    share_before = torch.cumsum(probabilities, dim=-1) - probabilities
    inside = (share_before < top_p[:, None]) | (top_p >= 1.0)[:, None]
    return order, probabilities * inside


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first place where the cumulative weight exceeds uniform * total, and its share of the total.

    A place of weight zero is never chosen: its cumulative weight equals the one before. (uniform is at most
    1 - 2^-52, so the product stays below the total.)
    """
    cumulative = torch.cumsum(weights, dim=-1)
    total = cumulative[:, -1:]
    place = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    place = place.clamp(max=weights.shape[-1] - 1)
    return place.squeeze(-1), (weights.gather(-1, place) / total).squeeze(-1)


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
