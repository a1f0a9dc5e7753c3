"""Keys and values of a fixed number of sequences, and how a pass writes and reads them.

One tensor per layer, `[slots + 2, K, columns, D]`. The last two rows are not sequences: `score_slot` holds what is
being scored, `scratch_slot` receives the keys and values of dummy rows, so that a pass always has the same shape and
nothing that is kept is touched.

A layer with full attention has a column for every position. One with a sliding window keeps the window and what a pass
may add to it: a ring, in which position p lies in column p modulo its size.

Masked positions are multiplied by a probability of exactly zero, so whatever lies there must be finite: slots start
as zeros and `wipe` clears one that held something else.

While nobody samples the storage can be given back (`release`) and is taken again, as zeros, by the next pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from keel.ops.attention.decode import COLUMN_BLOCK, attend_cache, column_counts, visible_mask
from keel.ops.attention.exact import KEY_BLOCK, attend_tiles, tile_positions
from keel.ops.numerics import is_exact


def layer_columns(capacity: int, window: int | None, pass_rows: int) -> int:
    """Columns of a layer: whole blocks for `capacity` positions, or for a window beside `pass_rows` new positions."""
    wanted = capacity if window is None else min(capacity, window + pass_rows)
    return -(-wanted // COLUMN_BLOCK) * COLUMN_BLOCK


@dataclass
class SlotCache:
    """Storage for `num_slots` sequences of up to `capacity` tokens. `routes` is there for a mixture of experts."""

    num_slots: int
    capacity: int
    keys: list[torch.Tensor]  # per layer [slots + 2, K, columns, D]
    values: list[torch.Tensor]  # per layer [slots + 2, K, columns, D]
    routes: torch.Tensor | None  # [slots + 2, cap, moe layers, k] int16: unsigned 16 bit, which torch cannot index
    layer_windows: tuple[int | None, ...]
    is_held: bool = True  # whether there is storage behind keys and values

    @classmethod
    def allocate(
        cls,
        num_slots: int,
        capacity: int,
        *,
        layer_windows: Sequence[int | None],
        pass_rows: int,
        num_kv_heads: int,
        head_dim: int,
        route_shape: tuple[int, int] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> SlotCache:
        """`layer_windows` says each layer's window, `pass_rows` how many tokens of a sequence a pass feeds at most."""
        columns = [layer_columns(capacity, window, pass_rows) for window in layer_windows]
        shapes = [(num_slots + 2, num_kv_heads, count, head_dim) for count in columns]
        keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        routes = None
        if route_shape is not None:
            routes = torch.zeros((num_slots + 2, capacity, *route_shape), dtype=torch.int16, device=device)
        return cls(num_slots, capacity, keys, values, routes, tuple(layer_windows))

    @property
    def score_slot(self) -> int:
        return self.num_slots

    @property
    def scratch_slot(self) -> int:
        return self.num_slots + 1

    @property
    def kept_behind(self) -> int:
        """A prefix of l positions can still be read of a slot into which at most this many more were written.

        Every position, unless a layer is a ring: of it the oldest of the window is the first to be written over.
        """
        windows = zip(self.keys, self.layer_windows, strict=True)
        rings = [keys.shape[2] - window for keys, window in windows if window and keys.shape[2] < self.capacity]
        return min(rings, default=self.capacity)

    @property
    def num_bytes(self) -> int:
        """What keys and values take while they are held; routes are small."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def release(self) -> None:
        """Give the storage back; what was in it is gone. The tensors stay, without anything behind them."""
        self.is_held = False
        for tensor in (*self.keys, *self.values):
            tensor.untyped_storage().resize_(0)

    def hold(self) -> None:
        """Take the storage again, as zeros; nothing happens if it is held."""
        if self.is_held:
            return
        for tensor in (*self.keys, *self.values):
            tensor.untyped_storage().resize_(tensor.nbytes)
            tensor.zero_()
        self.is_held = True

    def write_rows(self, columns: int, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Where a pass's keys go: `[T * K]` indices into a layer seen as `[(slots + 2) * K * columns, D]`."""
        num_heads = self.keys[0].shape[1]
        heads = torch.arange(num_heads, device=slots.device)
        return ((slots[:, None] * num_heads + heads) * columns + (positions % columns)[:, None]).reshape(-1)

    def store_routes(self, slots: torch.Tensor, positions: torch.Tensor, routes: torch.Tensor) -> None:
        """Keep the expert choices `routes [T, moe layers, k]` of a pass's rows."""
        if self.routes is not None:
            flat = self.routes.view(-1, *self.routes.shape[2:])
            flat.index_copy_(0, slots * self.capacity + positions, routes.to(torch.int16))

    def read_routes(self, slot: int, start: int, stop: int) -> bytes:
        """Expert choices of positions `start` to `stop - 1`, unsigned 16 bit, row-major, native byte order."""
        if self.routes is None:
            return b""
        return self.routes[slot, start:stop].cpu().numpy().tobytes()

    def copy_prefix(self, source: int, targets: Sequence[int], length: int) -> None:
        """Give every slot of `targets` the first `length` positions of slot `source`: keys, values and routes.

        Of a ring everything, which holds what those positions see of it if `kept_behind` says so.
        """
        rows = torch.tensor(list(targets), device=self.keys[0].device)
        for layer in (*self.keys, *self.values):
            columns = min(length, layer.shape[2]) if layer.shape[2] >= self.capacity else layer.shape[2]
            layer[rows, :, :columns] = layer[source, :, :columns].clone()
        if self.routes is not None:
            self.routes[rows, :length] = self.routes[source, :length]

    def wipe(self, slot: int) -> None:
        """Zero a slot (and the scratch slot) that may hold something that is not finite."""
        if not self.is_held:
            return
        for layer in (*self.keys, *self.values):
            layer[slot].zero_()
            layer[self.scratch_slot].zero_()


@dataclass(frozen=True)
class PassRows:
    """Which rows a pass has, and what of the cache each of them belongs to.

    A decode pass has one row for each slot. A prefill pass has the chunks of prompts one after the other, and filling
    behind them; for attention every chunk is an element of its own with `n` rows, the last ones not in use.
    """

    slots: torch.Tensor  # [T] where each row's keys and values go
    positions: torch.Tensor  # [T]
    query_positions: torch.Tensor  # [B, n] of the rows as attention sees them
    newest: torch.Tensor  # [B] last position of the element's sequence that this pass writes
    highest: int  # of all positions
    chunk_slots: torch.Tensor | None = None  # [B]; None: element b is slot b, and row b
    gathered: torch.Tensor | None = None  # [B * n] row of the pass that each row of attention is
    scattered: torch.Tensor | None = None  # [T] row of attention that each row of the pass is


class CacheView:
    """What a pass hands the model as `keel_cache`: every layer's attention comes here.

    The columns that are read are those that any row may see, counted in steps that change no bit (`column_counts`); so
    an element's bits depend on nothing that runs beside it.
    """

    def __init__(self, cache: SlotCache, rows: PassRows) -> None:
        self.cache = cache
        self.rows = rows
        self._write_rows: dict[int, torch.Tensor] = {}
        self._masks: dict[tuple[int | None, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        sinks: torch.Tensor | None = None,
        window: int | None = None,
        scaling: float,
    ) -> torch.Tensor:
        """`query [1, H, T, D]`, `key` and `value [1, K, T, D]` -> `[1, T, H, D]`.

        All rows' keys and values are written before any row attends, so a chunk may follow another of its sequence.
        Raises ValueError for a window that the layer's cache was not made for.
        """
        rows = self.rows
        self._check_window(layer_idx, window)
        keys, values = self._write(layer_idx, key[0], value[0])
        queries = query[0].transpose(0, 1)  # [T, H, D]
        if rows.gathered is not None:
            queries = queries.index_select(0, rows.gathered)
        queries = queries.unflatten(0, rows.query_positions.shape)  # [B, n, H, D]
        if is_exact():
            out = self._attend_exact(queries, keys, values, sinks, scaling, window)
        else:
            out = self._attend_fast(queries, keys, values, sinks, scaling, window)
        out = out.flatten(0, 1)
        if rows.scattered is not None:
            out = out.index_select(0, rows.scattered)
        return out.unsqueeze(0)

    def _attend_fast(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """`query [B, n, H, D]`, a layer's `keys` and `values [slots + 2, K, columns, D]` -> `[B, n, H, D]`."""
        group = query.shape[2] // keys.shape[1]
        columns = self._columns(keys, group)
        mask = self._mask(window, keys.shape[2], columns, group, query.dtype)
        keys, values = keys[:, :, :columns], values[:, :, :columns]
        if self.rows.chunk_slots is None:
            keys, values = keys[: query.shape[0]], values[: query.shape[0]]
        else:
            keys, values = (each.index_select(0, self.rows.chunk_slots) for each in (keys, values))
        return attend_cache(
            query,
            keys,
            values,
            positions=self.rows.query_positions,
            sinks=sinks,
            scale=scaling,
            window=window,
            mask=mask,
        )

    def _attend_exact(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """As `_attend_fast`, in tiles."""
        (batch, rows), kv_heads = self.rows.query_positions.shape, keys.shape[1]
        places = tile_positions(query.shape[2] // kv_heads)
        missing = -rows % places
        tiles = functional.pad(query, (0, 0, 0, 0, 0, missing)).reshape(-1, places, *query.shape[2:])
        positions = functional.pad(self.rows.query_positions, (0, missing), value=-1).view(-1, places)
        slots = self.rows.chunk_slots
        owners = None if slots is None else slots.repeat_interleave((rows + missing) // places)
        num_blocks = keys.shape[2] // KEY_BLOCK

        def key_block(block: int, some: slice) -> tuple[torch.Tensor, torch.Tensor]:
            start = block % num_blocks * KEY_BLOCK
            pair = (each[:, :, start : start + KEY_BLOCK] for each in (keys, values))
            if owners is None:
                first, second = (each[some].flatten(0, 1) for each in pair)
            else:
                first, second = (each.index_select(0, owners[some]).flatten(0, 1) for each in pair)
            return first, second

        out, _ = attend_tiles(tiles, positions, key_block, kv_heads=kv_heads, sinks=sinks, scale=scaling, window=window)
        return out.reshape(batch, rows + missing, *query.shape[2:])[:, :rows]

    def _write(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put `key` and `value [K, T, D]` where they belong."""
        keys, values = self.cache.keys[layer_idx], self.cache.values[layer_idx]
        columns, head_dim = keys.shape[2:]
        if columns not in self._write_rows:
            self._write_rows[columns] = self.cache.write_rows(columns, self.rows.slots, self.rows.positions)
        places = self._write_rows[columns]
        keys.view(-1, head_dim).index_copy_(0, places, key.transpose(0, 1).reshape(-1, head_dim))
        values.view(-1, head_dim).index_copy_(0, places, value.transpose(0, 1).reshape(-1, head_dim))
        return keys, values

    def _check_window(self, layer_idx: int, window: int | None) -> None:
        kept = self.cache.layer_windows[layer_idx]
        is_ring = self.cache.keys[layer_idx].shape[2] < self.cache.capacity
        if is_ring and (window is None or kept is None or window > kept):
            raise ValueError(
                f"key-value cache: layer {layer_idx} attends with window {window}, its cache keeps {kept}; make the "
                "engine anew after changing a model's windows"
            )

    def _columns(self, keys: torch.Tensor, group: int) -> int:
        """How many columns to read, of a layer's `keys`."""
        size, rows = keys.shape[2], self.rows.query_positions.shape[1]
        if self.rows.highest + 1 >= size:
            return size
        counts = column_counts(size, group * rows, keys.shape[3], keys.dtype, keys.device, torch.get_num_threads())
        return next(count for count in counts if count > self.rows.highest)

    def _mask(
        self, window: int | None, size: int, columns: int, group: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One mask per kind of layer and pass."""
        if (window, size) not in self._masks:
            self._masks[window, size] = visible_mask(
                self.rows.query_positions,
                capacity=columns,
                window=window,
                group=group,
                dtype=dtype,
                newest=self.rows.newest,
                ring=size if size < self.cache.capacity else None,
            )
        return self._masks[window, size]
