"""How many rows of an expert are worked on at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from keel.ops.matmul import padded_rows

NARROW = 2**18
"""Numbers of one expert's first weight up to which its rows are worked on in pieces of `PIECE_ROWS`."""
PIECE_ROWS = 1024


@dataclass(frozen=True)
class PiecePlan:
    """How many rows of one expert are worked on at once (0: all), and up to how many they are filled.

    Where weights are small, what a piece makes stays in the processor's cache from one kernel to the next. Where they
    are large, the products are all that takes time, and adding up gradients of pieces would come on top.
    """

    rows: int
    filled: bool

    def fill(self, count: int) -> int:
        """Rows that stand for `count` rows."""
        whole = count // self.rows * self.rows if self.rows else 0
        return whole + padded_rows(count - whole) if self.filled else count

    def pieces(self, rows: slice) -> list[slice]:
        """The pieces of one expert's sorted rows."""
        step = self.rows or max(1, rows.stop - rows.start)
        return [slice(start, min(start + step, rows.stop)) for start in range(rows.start, rows.stop, step)]


def piece_plan(hidden: torch.Tensor, gate_up: torch.Tensor) -> PiecePlan:
    """The plan for experts whose first weights are `gate_up`.

    Rows are filled up to few numbers of them where a library compiles a kernel for each that it meets, unless large
    weights make the additional rows dearer than the kernels are (bfloat16).
    """
    if hidden.device.type != "cpu":
        return PiecePlan(0, filled=False)
    narrow = gate_up[0].numel() <= NARROW
    return PiecePlan(PIECE_ROWS if narrow else 0, filled=narrow or hidden.dtype == torch.float32)
