"""Attention in which a row's bits depend on its own query and on the keys it sees, and on nothing else.

One function for both sides. A query row works through its sequence's keys in blocks of `KEY_BLOCK` positions, counted
from position 0; every product has the rows of one tile and one block of keys, whether the rows are one new token of an
engine or several tokens of a learner's packed sequence, and whether the keys come from a cache or were made just now.
An engine's tile is as low as can be, for it has one new token; a learner's is `WIDER` times as high where the library
makes the same bits of both, which `wider` measures, and else the same.

    scores      [sink | block 0 | block 1 | ...], -inf where a row sees nothing
    weights     softmax of that row; the sink is its first column and has no value
    out         block by block: sum over b of weights_b @ V_b

A block that a row does not see adds zeros to the sums, which changes no bit, so it does not matter how many blocks the
rows beside it need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

from keel.ops.attention.backends import BACKENDS
from keel.ops.attention.function import SinkBackward
from keel.ops.attention.layout import AttentionBackendError, Layout, packed_layout

KEY_BLOCK = 64
"""Positions per block of keys."""
WIDER = 8
_LEAD = 16
"""Columns before the first block: the sink and nothing else, so that blocks begin at whole vector registers."""
_MAX_SCORES = 2**19
"""At most so many scores are made at once, which stay in the cache of a core; but one tile's at least."""

KeyBlock = Callable[[int, slice], tuple[torch.Tensor, torch.Tensor]]
"""(block, tiles) -> keys and values [n * K, KEY_BLOCK, D] of that block for those tiles."""


def tile_rows(group: int) -> int:
    """Query rows of a product: those of one position or more, `group` being query heads per key head."""
    return max(8, -(-group // 4) * 4)


def tile_positions(group: int) -> int:
    """Positions of one tile; the heads of a group are filled up so that they divide the tile."""
    return tile_rows(group) // _group_rows(group)


@lru_cache(maxsize=64)
def wider(size: int, dtype: torch.dtype, num_threads: int) -> int:
    """`WIDER` if a row has the same bits in tiles that much higher (heads of `size`, `num_threads` threads), else 1."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3 * num_threads, WIDER * tile_rows(1), size, generator=generator, dtype=dtype)
    keys = torch.randn(3 * num_threads, KEY_BLOCK, size, generator=generator, dtype=dtype)
    weights = torch.softmax(torch.bmm(query, keys.transpose(1, 2)), -1)
    for left, right in ((query, keys.transpose(1, 2)), (weights, keys)):
        low = torch.cat([torch.bmm(part, right) for part in left.split(tile_rows(1), dim=1)], dim=1)
        if not torch.equal(low, torch.bmm(left, right)):
            return 1
    return WIDER


def _group_rows(group: int) -> int:
    """Rows per position: the group, filled up to a divisor of the tile's rows."""
    rows = tile_rows(group)
    return next(size for size in range(group, rows + 1) if rows % size == 0)


@torch.no_grad()
def attend_tiles(
    query: torch.Tensor,
    positions: torch.Tensor,
    key_block: KeyBlock,
    *,
    kv_heads: int,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query [N, P, H, D]`, `positions [N, P]` in their sequences (negative: not in use) -> (out like query, lse).

    P is `tile_positions`; lse `[N, P, H]` holds the sink. A row that is not in use is zero. No gradient.
    """
    num_heads = query.shape[2]
    outs, lses = [], []
    highest = int(positions.max()) if positions.numel() else -1
    columns = _LEAD + (highest // KEY_BLOCK + 1) * KEY_BLOCK
    step = max(1, _MAX_SCORES // (columns * num_heads * query.shape[1]))
    for start in range(0, query.shape[0], step):
        tiles = slice(start, min(start + step, query.shape[0]))
        out, lse = _attend_some(query[tiles], positions[tiles], key_block, tiles, kv_heads, sinks, scale, window)
        outs.append(out)
        lses.append(lse)
    if not outs:
        return torch.zeros_like(query), query.new_zeros(query.shape[:3])
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs), torch.cat(lses))


def _attend_some(
    query: torch.Tensor,
    positions: torch.Tensor,
    key_block: KeyBlock,
    tiles: slice,
    kv_heads: int,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    first, last = _blocks_seen(positions, window)
    num, places = positions.shape
    group = query.shape[2] // kv_heads
    rows = _as_rows(query.to(torch.promote_types(query.dtype, torch.float32)), kv_heads, group) * scale
    scores = rows.new_empty(num * kv_heads, rows.shape[1], _LEAD + (last - first) * KEY_BLOCK)
    scores[..., :_LEAD] = float("-inf")
    lead = scores.view(num, kv_heads, -1, places, scores.shape[-1])
    _set_sinks(lead[..., 0], sinks, group)
    lead[..., 1].masked_fill_(positions[:, None, None] < 0, 0.0)  # a row that sees nothing: no 0 / 0
    for block in range(first, last):
        keys, _ = key_block(block, tiles)
        part = scores[..., _LEAD + (block - first) * KEY_BLOCK :][..., :KEY_BLOCK]
        made = torch.bmm(rows, keys.to(rows.dtype).transpose(1, 2))
        hidden = _hidden(positions, block, window)[:, None, None]
        part.copy_(made.view(num, kv_heads, -1, places, KEY_BLOCK).masked_fill_(hidden, float("-inf")).view_as(made))
    weights = torch.softmax(scores, -1)
    out = torch.zeros_like(rows)
    for block in range(first, last):
        _, values = key_block(block, tiles)
        part = weights[..., _LEAD + (block - first) * KEY_BLOCK :][..., :KEY_BLOCK]
        out += torch.bmm(part.contiguous(), values.to(rows.dtype))
    # The largest weight is exp(largest score - lse): cheaper than a second pass of exponentials, and right to rounding.
    lse = scores.amax(-1) - weights.amax(-1).log()
    return (
        _from_rows(out, num, kv_heads, group, places).to(query.dtype),
        _from_rows(lse[..., None], num, kv_heads, group, places)[..., 0],
    )


def _blocks_seen(positions: torch.Tensor, window: int | None) -> tuple[int, int]:
    """First block that any of these rows sees, and the one after the last; at least one."""
    used = positions[positions >= 0]
    if used.numel() == 0:
        return 0, 1
    lowest = 0 if window is None else max(0, int(used.min()) - window + 1)
    return lowest // KEY_BLOCK, int(used.max()) // KEY_BLOCK + 1


def _hidden(positions: torch.Tensor, block: int, window: int | None) -> torch.Tensor:
    """[N, P, KEY_BLOCK] what rows at `positions` do not see of a block."""
    places = torch.arange(block * KEY_BLOCK, (block + 1) * KEY_BLOCK, device=positions.device)
    distance = positions[..., None] - places
    hidden = distance < 0
    return hidden if window is None else hidden.logical_or_(distance >= window)


def _set_sinks(column: torch.Tensor, sinks: torch.Tensor | None, group: int) -> None:
    """`column [N, K, group rows, P]` gets each head's sink."""
    if sinks is not None:
        column[:, :, :group] = sinks.to(column.dtype).view(1, column.shape[1], group, 1)


def _as_rows(query: torch.Tensor, kv_heads: int, group: int) -> torch.Tensor:
    """[N, P, H, D] -> [N * K, rows, D]: row g * P + i is position i of the group's head g; the others are zero."""
    num, places, _, size = query.shape
    rows = query.new_zeros(num, kv_heads, _group_rows(group), places, size)
    rows[:, :, :group] = query.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)
    return rows.view(num * kv_heads, -1, size)


def _from_rows(rows: torch.Tensor, num: int, kv_heads: int, group: int, places: int) -> torch.Tensor:
    """[N * K, rows, D] -> [N, P, H, D]."""
    split = rows.view(num, kv_heads, -1, places, rows.shape[-1])[:, :, :group]
    return split.permute(0, 3, 1, 2, 4).reshape(num, places, kv_heads * group, rows.shape[-1])


@dataclass(frozen=True)
class PackedTiles:
    """Packed sequences cut into tiles of positions, in order of position, and into blocks of keys."""

    query_rows: torch.Tensor  # [N, P] row of each place; places not in use repeat row 0
    positions: torch.Tensor  # [N, P], -1: not in use
    slots: torch.Tensor  # [T] where each row lies among the N * P places
    block_rows: torch.Tensor  # [B, KEY_BLOCK] rows of keys of every sequence's blocks; past a sequence's end, its last
    first_block: torch.Tensor  # [N] number of the first block of the tile's sequence
    num_blocks: torch.Tensor  # [N] blocks of the tile's sequence


@lru_cache(maxsize=16)
def packed_tiles(bounds: tuple[int, ...], places: int) -> PackedTiles:
    """The tiles of sequences that start at `bounds [S + 1]`."""
    query_rows, positions, blocks, first_blocks, counts = [], [], [], [], []
    num_blocks = 0
    for start, stop in pairwise(bounds):
        length = stop - start
        if length == 0:
            continue
        steps = torch.arange(-(-length // places) * places).view(-1, places)
        positions.append(torch.where(steps < length, steps, -1))
        query_rows.append(torch.where(steps < length, steps + start, 0))
        own = -(-length // KEY_BLOCK)
        blocks.append((torch.arange(own * KEY_BLOCK).clamp(max=length - 1) + start).view(-1, KEY_BLOCK))
        first_blocks.append(torch.full((steps.shape[0],), num_blocks))
        counts.append(torch.full((steps.shape[0],), own))
        num_blocks += own
    at = torch.cat(positions)
    order = torch.argsort(at[:, 0], stable=True)  # tiles that need as many blocks stand together
    rows, at = torch.cat(query_rows)[order], at[order]
    slots = torch.empty(bounds[-1], dtype=torch.int64)
    used = (at >= 0).reshape(-1).nonzero()[:, 0]
    slots[rows.reshape(-1)[used]] = used
    return PackedTiles(rows, at, slots, torch.cat(blocks), torch.cat(first_blocks)[order], torch.cat(counts)[order])


class _ExactAttention(SinkBackward):
    """Forward by `attend_tiles`; backward by the stock CPU kernel, from the (out, lse) made here."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        layout: Layout,
        bounds: tuple[int, ...],
        scale: float,
    ) -> torch.Tensor:
        factor = wider(q.shape[2], torch.promote_types(q.dtype, torch.float32), torch.get_num_threads())
        tiles = packed_tiles(bounds, tile_positions(q.shape[1] // k.shape[1]) * factor)
        keys = k.index_select(0, tiles.block_rows.view(-1)).unflatten(0, (-1, KEY_BLOCK)).transpose(1, 2).contiguous()
        values = v.index_select(0, tiles.block_rows.view(-1)).unflatten(0, (-1, KEY_BLOCK)).transpose(1, 2).contiguous()

        def key_block(block: int, some: slice) -> tuple[torch.Tensor, torch.Tensor]:
            index = tiles.first_block[some] + torch.clamp(tiles.num_blocks[some] - 1, max=block)
            return keys.index_select(0, index).flatten(0, 1), values.index_select(0, index).flatten(0, 1)

        query = q.index_select(0, tiles.query_rows.view(-1)).view(*tiles.query_rows.shape, *q.shape[1:])
        out, lse = attend_tiles(
            query,
            tiles.positions,
            key_block,
            kv_heads=k.shape[1],
            sinks=sinks,
            scale=scale,
            window=layout.window,
        )
        out = out.flatten(0, 1).index_select(0, tiles.slots)
        lse = lse.flatten(0, 1).index_select(0, tiles.slots)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.layout, ctx.scale, ctx.backend = layout, scale, BACKENDS["cpu"]
        return out


def exact_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """`sink_attention` over packed sequences, with the bits that `attend_tiles` gives an engine; differentiable.

    Shapes as there. Raises AttentionBackendError off the CPU, where none of this was measured.
    """
    if q.device.type != "cpu":
        raise AttentionBackendError(f"exact attention was measured on the CPU only, the tensors are on {q.device}")
    bounds = tuple(cu_seqlens.tolist())
    layout = packed_layout(cu_seqlens, window)
    out: torch.Tensor = _ExactAttention.apply(q, k, v, sinks, layout, bounds, scale)  # type: ignore[no-untyped-call]
    return out
