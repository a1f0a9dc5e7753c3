"""Passes through the model, each of one fixed shape: what makes a request's bits independent of its neighbours.

Rows of a pass are independent but for attention, and attention is done sequence by sequence (`cache`). What is left is
that a row's bits must not depend on where in the pass it lies. Matrix products and vectorized element-wise
functions keep that only when rows come in whole vector-register blocks (measured: a product of 5 rows on two threads
and a sigmoid's tail of fewer than 32 numbers do not), so passes have a multiple of `ROW_MULTIPLE` rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from keel.engines.embedded.cache import CacheView, SlotCache
from keel.engines.embedded.scheduler import Chunk
from keel.engines.embedded.slots import SlotTable
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

    def __init__(self, policy: PolicyModel, cache: SlotCache, table: SlotTable, tile_rows: int, chunk: int) -> None:
        self.policy, self.cache, self.table = policy, cache, table
        self.tile_rows, self.chunk = tile_rows, chunk
        self.with_routes = cache.routes is not None
        self.device = cache.keys[0].device
        self._all_slots = np.arange(table.rows)
        self.num_passes = {"decode": 0, "prefill": 0}

    def decode(self, active: np.ndarray) -> torch.Tensor:
        """Feed the last known token of the `active [rows]` slots: hidden `[rows, Hd]`; other rows mean nothing."""
        table = self.table
        token_ids = np.where(active, table.tokens[self._all_slots, np.where(active, table.fed, 0)], 0)
        positions = np.where(active, table.fed, 0)
        write_slots = np.where(active, self._all_slots, self.cache.scratch_slot)
        self.num_passes["decode"] += 1
        return self._run(token_ids, positions, write_slots, positions[:, None], None)

    def prefill(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Feed `chunks` of the table's tokens in one tile: hidden of each chunk's last position `[chunks, Hd]`."""
        tokens = [self.table.tokens[chunk.slot, chunk.start : chunk.stop] for chunk in chunks]
        hidden = self._tile(chunks, tokens)
        self.num_passes["prefill"] += 1
        last = [index * self.chunk + chunk.stop - chunk.start - 1 for index, chunk in enumerate(chunks)]
        return hidden.index_select(0, torch.tensor(last, device=self.device))

    def score_tile(self, token_ids: np.ndarray, start: int) -> torch.Tensor:
        """Feed `token_ids [n]`, n <= tile rows, at positions from `start` on of the scoring slot: hidden `[n, Hd]`."""
        stop = start + len(token_ids)
        slot = self.cache.score_slot
        chunks = [Chunk(slot, at, min(at + self.chunk, stop), False) for at in range(start, stop, self.chunk)]
        hidden = self._tile(chunks, [token_ids[chunk.start - start : chunk.stop - start] for chunk in chunks])
        return hidden[: len(token_ids)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[n, Hd]` -> `[n, V]` float32, always computed in blocks of as many rows as a decode pass has."""
        rows = self.table.rows
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
        """One prefill pass, `[tile_rows, Hd]`; chunk i has rows `i * chunk` and following."""
        count = self.tile_rows // self.chunk
        scratch = self.cache.scratch_slot
        token_ids = np.zeros((count, self.chunk), dtype=np.int64)
        positions = np.zeros((count, self.chunk), dtype=np.int64)
        write_slots = np.full((count, self.chunk), scratch, dtype=np.int64)
        chunk_slots = np.full(count, scratch, dtype=np.int64)
        for index, (chunk, part) in enumerate(zip(chunks, tokens, strict=True)):
            used = chunk.stop - chunk.start
            token_ids[index, :used] = part
            positions[index, :used] = np.arange(chunk.start, chunk.stop)
            write_slots[index, :used] = chunk_slots[index] = chunk.slot
        return self._run(token_ids.reshape(-1), positions.reshape(-1), write_slots.reshape(-1), positions, chunk_slots)

    def _run(
        self,
        token_ids: np.ndarray,
        positions: np.ndarray,
        write_slots: np.ndarray,
        query_positions: np.ndarray,
        chunk_slots: np.ndarray | None,
    ) -> torch.Tensor:
        self.cache.hold()
        ids, places, slots = (torch.from_numpy(a).to(self.device) for a in (token_ids, positions, write_slots))
        view = CacheView(
            self.cache,
            torch.from_numpy(query_positions).to(self.device),
            self.cache.write_rows(slots, places),
            None if chunk_slots is None else torch.from_numpy(chunk_slots).to(self.device),
        )
        with torch.no_grad(), row_invariant_experts():
            hidden, routes = self.policy.trunk(ids, places, with_routes=self.with_routes, keel_cache=view)
        if routes is not None:
            self.cache.store_routes(slots, places, routes)
        return hidden


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
