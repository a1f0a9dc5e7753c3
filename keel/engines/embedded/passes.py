"""Passes through the model, each of one fixed shape: what makes a request's bits independent of its neighbours.

Rows of a pass are independent but for attention, and attention is done sequence by sequence (`cache`). What is left is
that a row's bits must not depend on where in the pass it lies. Matrix products and vectorized element-wise
functions keep that only when rows come in whole vector-register blocks (measured: a product of 5 rows on two threads
and a sigmoid's tail of fewer than 32 numbers do not), so passes have a multiple of `ROW_MULTIPLE` rows.

Nor must they depend on how many rows there are. Where the model, run with random tokens on this machine, shows that
they do not (`keel.models.lean`), a pass has no more rows than there is work for; else always the same number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from keel.engines.embedded.cache import CacheView, PassRows, SlotCache
from keel.engines.embedded.scheduler import Chunk
from keel.engines.embedded.slots import SlotTable
from keel.models import lean
from keel.models.experts import row_invariant_experts

if TYPE_CHECKING:
    from keel.models.policy import PolicyModel

ROW_MULTIPLE = 32


def whole_rows(count: int, multiple: int = ROW_MULTIPLE) -> int:
    """`count` rounded up to whole blocks of rows."""
    return -(-count // multiple) * multiple


class Passes:
    """Runs decode, prefill and head passes of a policy over a `SlotCache`.

    Under `no_grad`, not `inference_mode`: whatever a module keeps from such a pass could never be trained on.
    """

    def __init__(
        self, policy: PolicyModel, cache: SlotCache, table: SlotTable, tile_rows: int, chunk: int, tile_chunks: int
    ) -> None:
        """A tile has at most `tile_rows` rows, of at most `tile_chunks` chunks of up to `chunk` rows."""
        self.policy, self.cache, self.table = policy, cache, table
        self.tile_rows, self.chunk, self.tile_chunks = tile_rows, chunk, tile_chunks
        self.with_routes = cache.routes is not None
        self.device = cache.keys[0].device
        self._all_slots = np.arange(table.rows)
        self.lean_problem = lean.problem(policy)
        """Why passes run the model's modules; "": they do not, as long as nobody has a hook on one."""
        self._lean = None if self.lean_problem else lean.LeanTrunk(policy)
        self.row_step = self._lean.row_step() if self._lean is not None else 0
        """Passes have a multiple of so many rows; 0: always as many as there can be."""
        self.num_passes = {"decode": 0, "prefill": 0, "lean": 0}

    def decode(self, active: np.ndarray) -> torch.Tensor:
        """Feed the last known token of the `active [rows]` slots: hidden `[rows, Hd]`; other rows mean nothing."""
        table = self.table
        slots = np.flatnonzero(active)
        count = self._height(len(slots), table.rows)
        self.num_passes["decode"] += 1
        write_slots = np.full(count, self.cache.scratch_slot)
        positions, token_ids = np.zeros((2, count), dtype=np.int64)
        owners = slots if count < table.rows else self._all_slots  # row of the pass -> slot
        taken = slice(0, len(owners))
        fed = np.where(active, table.fed, 0)
        write_slots[taken] = np.where(active, self._all_slots, self.cache.scratch_slot)[owners]
        positions[taken] = fed[owners]
        token_ids[taken] = np.where(active, table.tokens[self._all_slots, fed], 0)[owners]
        rows = PassRows(
            self._tensor(write_slots),
            self._tensor(positions),
            self._tensor(fed)[:, None],
            self._tensor(fed),
            int(fed.max()),
        )
        if count < table.rows:
            rows = self._by_slots(rows, owners)
        hidden = self._run(self._tensor(token_ids), rows)
        if rows.scattered is None:
            return hidden
        spread = hidden.new_zeros(table.rows, hidden.shape[1])
        return spread.index_copy_(0, self._tensor(owners), hidden[taken])

    def _by_slots(self, rows: PassRows, owners: np.ndarray) -> PassRows:
        """The same rows, for attention slot by slot up to the last that has one: row i belongs to slot `owners[i]`."""
        count = int(owners[-1]) + 1
        gathered, scattered = np.zeros(count, dtype=np.int64), np.zeros(len(rows.slots), dtype=np.int64)
        gathered[owners] = np.arange(len(owners))
        scattered[: len(owners)] = owners
        return replace(
            rows,
            query_positions=rows.query_positions[:count],
            newest=rows.newest[:count],
            gathered=self._tensor(gathered),
            scattered=self._tensor(scattered),
        )

    def _height(self, wanted: int, most: int) -> int:
        """Rows of a pass that needs `wanted`."""
        return most if self.row_step == 0 else min(most, whole_rows(max(1, wanted), self.row_step))

    def prefill(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Feed `chunks` of the table's tokens in one tile: hidden of each chunk's last position `[chunks, Hd]`."""
        tokens = [self.table.tokens[chunk.slot, chunk.start : chunk.stop] for chunk in chunks]
        hidden = self._tile(chunks, tokens)
        self.num_passes["prefill"] += 1
        ends = np.cumsum([chunk.stop - chunk.start for chunk in chunks])
        return hidden.index_select(0, self._tensor(ends - 1))

    def score_tile(self, token_ids: np.ndarray, start: int) -> torch.Tensor:
        """Feed `token_ids [n]`, n <= tile rows, at positions from `start` on of the scoring slot: hidden `[n, Hd]`."""
        stop = start + len(token_ids)
        slot = self.cache.score_slot
        chunks = [Chunk(slot, at, min(at + self.chunk, stop), False) for at in range(start, stop, self.chunk)]
        hidden = self._tile(chunks, [token_ids[chunk.start - start : chunk.stop - start] for chunk in chunks])
        return hidden[: len(token_ids)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[n, Hd]` -> `[n, V]` float32, computed in blocks of as many rows as a decode pass has."""
        rows = self._height(hidden.shape[0], self.table.rows)
        parts = []
        with torch.no_grad():
            for start in range(0, hidden.shape[0], rows):
                part = hidden[start : start + rows]
                missing = rows - part.shape[0]
                if missing:
                    part = torch.cat((part, part.new_zeros(missing, part.shape[1])))
                parts.append(self.policy.logits(part)[: rows - missing])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _tile(self, chunks: Sequence[Chunk], tokens: Sequence[np.ndarray]) -> torch.Tensor:
        """One prefill pass, `[tile rows or fewer, Hd]`: the rows of `chunks` one after the other."""
        scratch = self.cache.scratch_slot
        # On the CPU an element's bits do not depend on how many there are; elsewhere their number stays the same.
        count = len(chunks) if self.device.type == "cpu" else self.tile_chunks
        height = self._height(sum(chunk.stop - chunk.start for chunk in chunks), self.tile_rows)
        token_ids, positions, scattered = np.zeros((3, height), dtype=np.int64)
        write_slots = np.full(height, scratch, dtype=np.int64)
        query_positions, gathered = np.zeros((2, count, self.chunk), dtype=np.int64)
        chunk_slots = np.full(count, scratch, dtype=np.int64)
        last = {chunk.slot: chunk.stop - 1 for chunk in chunks}  # of several chunks of a slot the last one counts
        newest = np.zeros(count, dtype=np.int64)
        start = 0
        for index, (chunk, part) in enumerate(zip(chunks, tokens, strict=True)):
            used = chunk.stop - chunk.start
            rows = slice(start, start + used)
            token_ids[rows] = part
            positions[rows] = query_positions[index, :used] = np.arange(chunk.start, chunk.stop)
            write_slots[rows] = chunk_slots[index] = chunk.slot
            gathered[index, :used] = np.arange(start, start + used)
            scattered[rows] = index * self.chunk + np.arange(used)
            newest[index] = last[chunk.slot]
            start += used
        return self._run(
            self._tensor(token_ids),
            PassRows(
                self._tensor(write_slots),
                self._tensor(positions),
                self._tensor(query_positions),
                self._tensor(newest),
                int(positions.max()),
                self._tensor(chunk_slots),
                self._tensor(gathered.reshape(-1)),
                self._tensor(scattered),
            ),
        )

    def _run(self, token_ids: torch.Tensor, rows: PassRows) -> torch.Tensor:
        self.cache.hold()
        view = CacheView(self.cache, rows)
        if self._lean is not None and not self._lean.is_hooked():
            self.num_passes["lean"] += 1
            hidden, routes = self._lean(token_ids, rows.positions, view, with_routes=self.with_routes)
        else:
            with torch.no_grad(), row_invariant_experts():
                hidden, routes = self.policy.trunk(
                    token_ids, rows.positions, with_routes=self.with_routes, keel_cache=view
                )
        if routes is not None:
            self.cache.store_routes(rows.slots, rows.positions, routes)
        return hidden

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


@contextmanager
def evaluation_mode(policy: PolicyModel) -> Iterator[None]:
    """Dropout and its kin off for the duration; modules that were in training mode are put back into it."""
    training = [module for module in policy.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
