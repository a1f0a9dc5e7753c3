"""Keys and values of a fixed number of sequences, and how a pass writes and reads them.

One tensor per layer, `[slots + 2, K, cap, D]`. The last two rows are not sequences: `score_slot` holds what is being
scored, `scratch_slot` receives the keys and values of dummy rows (and of the unused end of a chunk), so that a pass
always has the same shape and nothing that is kept is touched.

Masked positions are multiplied by a probability of exactly zero, so whatever lies there must be finite: slots start
as zeros and `wipe` clears one that held something else.

While nobody samples the storage can be given back (`release`) and is taken again, as zeros, by the next pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from keel.ops.attention.decode import attend_cache, visible_mask
from keel.ops.attention.exact import KEY_BLOCK, attend_tiles, tile_positions
from keel.ops.numerics import is_exact

ROW_BLOCK = 4
"""Rows per attention kernel call: of fewer than four query rows, the CPU's skinny product gives other bits in another
thread (measured on two threads in float32: 9 of 10 batch elements change with their place), and is slower too."""


@dataclass
class SlotCache:
    """Storage for `num_slots` sequences of up to `capacity` tokens. `routes` is there for a mixture of experts."""

    num_slots: int
    capacity: int
    keys: list[torch.Tensor]  # per layer [slots + 2, K, cap, D]
    values: list[torch.Tensor]  # per layer [slots + 2, K, cap, D]
    routes: torch.Tensor | None  # [slots + 2, cap, moe layers, k] int16: unsigned 16 bit, which torch cannot index
    is_held: bool = True  # whether there is storage behind keys and values

    @classmethod
    def allocate(
        cls,
        num_slots: int,
        capacity: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        route_shape: tuple[int, int] | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> SlotCache:
        shape = (num_slots + 2, num_kv_heads, capacity, head_dim)
        keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        routes = None
        if route_shape is not None:
            routes = torch.zeros((num_slots + 2, capacity, *route_shape), dtype=torch.int16, device=device)
        return cls(num_slots, capacity, keys, values, routes)

    @property
    def score_slot(self) -> int:
        return self.num_slots

    @property
    def scratch_slot(self) -> int:
        return self.num_slots + 1

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

    def write_rows(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Where the keys of a pass's rows go: `[T * K]` indices into a layer seen as `[(slots + 2) * K * cap, D]`."""
        num_heads = self.keys[0].shape[1]
        heads = torch.arange(num_heads, device=slots.device)
        return ((slots[:, None] * num_heads + heads) * self.capacity + positions[:, None]).reshape(-1)

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
        """Give every slot of `targets` the first `length` positions of slot `source`: keys, values and routes."""
        rows = torch.tensor(list(targets), device=self.keys[0].device)
        for layer in (*self.keys, *self.values):
            layer[rows, :, :length] = layer[source, :, :length]
        if self.routes is not None:
            self.routes[rows, :length] = self.routes[source, :length]

    def wipe(self, slot: int) -> None:
        """Zero a slot (and the scratch slot) that may hold something that is not finite."""
        if not self.is_held:
            return
        for layer in (*self.keys, *self.values):
            layer[slot].zero_()
            layer[self.scratch_slot].zero_()


class CacheView:
    """What a pass hands the model as `keel_cache`: every layer's attention comes here.

    A decode pass has `[slots]` batch elements of one row, row b being the next token of slot b. A prefill pass has as
    many batch elements as chunks, `n` consecutive positions of one sequence each. Either way a batch element covers
    the whole capacity, and unused rows are computed and thrown away: its shape depends on nothing that runs beside it.
    """

    def __init__(
        self, cache: SlotCache, positions: torch.Tensor, write_rows: torch.Tensor, chunk_slots: torch.Tensor | None
    ) -> None:
        """`positions [B, n]` int64; `write_rows [B * n * K]`; `chunk_slots [B]`, or None: element b is slot b."""
        self.cache = cache
        self.positions = positions
        self.write_rows = write_rows
        self.chunk_slots = chunk_slots
        self._masks: dict[int | None, tuple[torch.Tensor, torch.Tensor]] = {}

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
        """`query [1, H, T, D]`, `key` and `value [1, K, T, D]` with T = B * n -> `[1, T, H, D]`.

        All rows' keys and values are written before any row attends, so a chunk may follow another of its sequence.
        """
        keys, values = self._write(layer_idx, key[0], value[0])
        batch, rows = self.positions.shape
        if is_exact():
            by_chunk = query[0].transpose(0, 1).unflatten(0, (batch, rows))
            return self._attend_exact(by_chunk, keys, values, sinks, scaling, window).flatten(0, 1).unsqueeze(0)
        if self.chunk_slots is None:
            keys, values = keys[:batch], values[:batch]
        else:
            keys, values = keys.index_select(0, self.chunk_slots), values.index_select(0, self.chunk_slots)
        group = query.shape[1] // key.shape[1]
        unused = -group * rows % ROW_BLOCK // rows  # dummy heads in each group
        queries = query[0].transpose(0, 1).unflatten(0, (batch, rows))  # [B, n, H, D]
        out = attend_cache(
            _more_heads(queries, -2, group, unused),
            keys,
            values,
            positions=self.positions,
            sinks=None if sinks is None else _more_heads(sinks, -1, group, unused),
            scale=scaling,
            window=window,
            mask=self._mask(window, group + unused, query.dtype),
        )
        return _fewer_heads(out, group, unused).flatten(0, 1).unsqueeze(0)

    def _attend_exact(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        sinks: torch.Tensor | None,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        """`query [B, n, H, D]`, a layer's `keys` and `values [slots + 2, K, cap, D]` -> `[B, n, H, D]`, in tiles."""
        (batch, rows), kv_heads = self.positions.shape, keys.shape[1]
        places = tile_positions(query.shape[2] // kv_heads)
        missing = -rows % places
        tiles = functional.pad(query, (0, 0, 0, 0, 0, missing)).reshape(-1, places, *query.shape[2:])
        positions = functional.pad(self.positions, (0, missing), value=-1).view(-1, places)
        owners = None if self.chunk_slots is None else self.chunk_slots.repeat_interleave((rows + missing) // places)

        def key_block(block: int, some: slice) -> tuple[torch.Tensor, torch.Tensor]:
            columns = slice(block * KEY_BLOCK, (block + 1) * KEY_BLOCK)
            pair = (each[:, :, columns] for each in (keys, values))
            if owners is None:
                first, second = (each[some].flatten(0, 1) for each in pair)
            else:
                first, second = (each.index_select(0, owners[some]).flatten(0, 1) for each in pair)
            return first, second

        out, _ = attend_tiles(tiles, positions, key_block, kv_heads=kv_heads, sinks=sinks, scale=scaling, window=window)
        return out.reshape(batch, rows + missing, *query.shape[2:])[:, :rows]

    def _write(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put `key` and `value [K, T, D]` where `write_rows` says."""
        keys, values = self.cache.keys[layer_idx], self.cache.values[layer_idx]
        head_dim = keys.shape[-1]
        keys.view(-1, head_dim).index_copy_(0, self.write_rows, key.transpose(0, 1).reshape(-1, head_dim))
        values.view(-1, head_dim).index_copy_(0, self.write_rows, value.transpose(0, 1).reshape(-1, head_dim))
        return keys, values

    def _mask(self, window: int | None, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """One mask per kind of layer and pass."""
        if window not in self._masks:
            capacity = self.cache.capacity
            self._masks[window] = visible_mask(
                self.positions, capacity=capacity, window=window, group=group, dtype=dtype
            )
        return self._masks[window]


def _more_heads(tensor: torch.Tensor, dim: int, group: int, unused: int) -> torch.Tensor:
    """`tensor` with `unused` zero heads after each `group` of its heads, which lie in dimension `dim` (-1 or -2)."""
    if unused == 0:
        return tensor
    grouped: torch.Tensor = tensor.unflatten(dim, (-1, group))
    return functional.pad(grouped, (0, 0) * (-dim - 1) + (0, unused)).flatten(dim - 1, dim)


def _fewer_heads(out: torch.Tensor, group: int, unused: int) -> torch.Tensor:
    """`out [B, n, K * (group + unused), D]` without the unused heads."""
    if unused == 0:
        return out
    grouped: torch.Tensor = out.unflatten(2, (-1, group + unused))
    return grouped[:, :, :, :group].flatten(2, 3)
