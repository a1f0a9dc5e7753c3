"""Exact numerics, switched on by context: a token's bits then depend on its own past alone, in every product.

A library picks its kernel, and with it the order of a sum, by the shape of a product; so the same token gets other last
bits in a batch of another size. In exact mode every product is made in tiles of `TILE_ROWS` rows, the last filled up
with zeros: one shape, one kernel, and in a product of one shape a row's bits depend neither on the other rows nor on
its place among them (measured; `keel.models.exact` measures it again before a run).

What is done row by row (norms, softmax, gathers) and what IEEE rounds alike anywhere (+, -, *, /) is exact by itself.
What is left are functions of single numbers such as silu: a vectorized one gives other bits in the last few numbers of
a buffer, or of one thread's share of it, than in the rest, so `silu` is given shares that are whole vector registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch.nn import functional

TILE_ROWS = 64
"""Rows of every product in exact mode; passes of engine and learner have whole tiles."""
_SHARE = 16_384
"""Numbers per call of an elementwise function: torch gives fewer than 32,768 to one thread."""

_exact: ContextVar[bool] = ContextVar("keel_exact_numerics", default=False)


@contextmanager
def exact_numerics() -> Iterator[None]:
    """In this context (and in no other thread) Keel's operators are exact; nesting changes nothing."""
    token = _exact.set(True)
    try:
        yield
    finally:
        _exact.reset(token)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """If `wanted`, torch refuses what it can only do in an order left to chance, in the whole process; afterwards as
    before."""
    before = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned_only)


def is_exact() -> bool:
    """Whether this is inside `exact_numerics`."""
    return _exact.get()


def whole_tiles(num_rows: int) -> int:
    """`num_rows` rounded up to whole tiles."""
    return -(-num_rows // TILE_ROWS) * TILE_ROWS


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x), where a number's bits do not depend on its place; `x` of any shape, with gradient.

    Exact if `x` has a multiple of 32 numbers: that is, whole tiles of rows.
    """
    if torch.get_num_threads() == 1 or x.numel() <= _SHARE or x.device.type != "cpu":
        return functional.silu(x.contiguous())
    parts = [functional.silu(part) for part in x.reshape(-1).split(_SHARE)]
    return torch.cat(parts).view(x.shape)
