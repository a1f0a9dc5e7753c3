"""Attention of a few new rows over a padded key-value cache: what an engine that samples needs, without gradient.

Grouped heads become rows: the G query heads of a key head are G rows of one small matrix, so each key is read once.
The kernel works on one (batch element, key head) at a time with shapes that depend on n, G and the number of columns
alone; an element's result therefore has the same bits whatever the other elements hold, and whatever finite values lie
in its cache beyond what it may see (their weight is exactly zero).

A cache of a sliding window may be a ring: position p lies in column p modulo the number of columns.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from keel.ops.attention.sinks import apply_sinks

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

ROW_BLOCK = 4
"""Query rows come in whole blocks: of fewer than four, the CPU's skinny product gives other bits in another thread
(measured on two threads in float32: 9 of 10 batch elements change with their place), and is slower too."""
COLUMN_BLOCK = 64
"""Caches are read up to a multiple of so many columns, where that changes no bit."""
WIDE_BYTES = 2**28
"""Off the CPU, at most this much of keys and values is held in float32 at a time."""


def visible_mask(
    positions: torch.Tensor,
    *,
    capacity: int,
    window: int | None,
    group: int,
    dtype: torch.dtype,
    newest: torch.Tensor | None = None,
    ring: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows at `positions` [B, n] see of a cache; shared by all layers of one window in a forward pass.

    `capacity` is how many columns are read. `ring` is how many columns a ring has, and `newest` [B] the last position
    written to each element's: column c then holds the newest position that is c modulo `ring`.

    Returns (mask [B, 1, R, capacity] of 0 and -inf in `dtype`, empty [B, n] bool: rows that see nothing, which is
    how a negative position marks a row that is not in use). R is G * n filled up to whole blocks, `group` G = query
    heads / key heads.
    """
    columns = torch.arange(capacity, device=positions.device)
    if ring is not None and newest is not None:
        held = newest[:, None] - (newest[:, None] - columns) % ring  # [B, capacity]
        distance = positions[:, :, None] - held[:, None]
        hidden = (distance < 0) | (held < 0)[:, None]
    else:
        distance = positions[:, :, None] - columns  # [B, n, capacity]
        hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, float("-inf"))
    rows = positions.shape[1]
    blocks = _whole_blocks(group * rows)
    if rows == 1:
        return mask.unsqueeze(1).expand(-1, 1, blocks, -1), hidden.all(-1)
    return mask.repeat(1, -(-blocks // rows), 1)[:, :blocks].unsqueeze(1), hidden.all(-1)


@torch.no_grad()
def attend_cache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    positions: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int | None,
    mask: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """q [B, n, H, D], caches [B, K, capacity, D] (new rows already written) -> out [B, n, H, D].

    Row (b, i) stands at `positions` [B, n] and sees cache positions p <= positions[b, i] with positions[b, i] - p <
    window. A negative position sees nothing and gives zeros. `mask` is `visible_mask` of the same positions, capacity,
    window, group and type, made once for all layers. What lies in the cache must be finite (start it with zeros): a
    weight of zero cannot silence a NaN. Raises ValueError on shapes that do not fit.
    """
    if mask is None:
        group = q.shape[2] // k_cache.shape[1]
        mask = visible_mask(positions, capacity=k_cache.shape[2], window=window, group=group, dtype=q.dtype)
    out, lse = attend_cache_part(q, k_cache, v_cache, scale=scale, mask=mask)
    return out if sinks is None else apply_sinks(out, lse, sinks)[0]


@torch.no_grad()
def attend_cache_part(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    scale: float,
    mask: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain (out [B, n, H, D], lse [B, n, H]) over one part of a cache, to be merged or given its sink; see above."""
    batch, rows, heads, size = q.shape
    kv_heads, capacity = k_cache.shape[1], k_cache.shape[2]
    if k_cache.shape != (batch, kv_heads, capacity, size) or v_cache.shape != k_cache.shape or heads % kv_heads:
        raise ValueError(
            f"attend_cache needs q [B, n, H, D], caches [B, K, capacity, D], H a multiple of K; got q {list(q.shape)}, "
            f"k_cache {list(k_cache.shape)}, v_cache {list(v_cache.shape)}"
        )
    additive, empty = mask
    group = heads // kv_heads
    used = group * rows
    # [B, n, K, G, D] -> [B, K, G * n, D]: row g * n + i is query i of the group's head g.
    query = q.view(batch, rows, kv_heads, group, size).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, used, size)
    if additive.shape[2] > used:
        query = torch.nn.functional.pad(query, (0, 0, 0, additive.shape[2] - used))
    out, lse = _attend(query, k_cache, v_cache, additive, scale)
    out = out[:, :, :used].reshape(batch, kv_heads, group, rows, size)
    out = out.permute(0, 3, 1, 2, 4).reshape(batch, rows, heads, size)
    lse = lse[:, :, :used].reshape(batch, kv_heads, group, rows).permute(0, 3, 1, 2).reshape(batch, rows, heads)
    # The kernel says (0, 0) for a row that sees nothing; nothing seen is (0, -inf).
    return out, lse.masked_fill(empty.unsqueeze(-1), float("-inf"))


@lru_cache(maxsize=64)
@torch.no_grad()
def column_counts(
    capacity: int, rows: int, size: int, dtype: torch.dtype, device: torch.device, num_threads: int
) -> tuple[int, ...]:
    """How many columns of a cache of `capacity` may be read, rising, where reading all of them would change no bit.

    A row that sees no further than the first c columns has the weight zero for the rest, but a library may sum a longer
    row in another order. So it is measured, with random rows (`rows` query heads times new rows, heads of `size`).
    """
    rows, batch = _whole_blocks(rows), 4 * num_threads + 3
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, 1, rows, size), (batch, 1, capacity, size), (batch, 1, capacity, size))
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    good = []
    for columns in _candidates(capacity):
        last = torch.randint(columns // 2, columns, (batch, 1), generator=generator).clamp(max=columns - 1)
        same = True
        for window in (None, COLUMN_BLOCK):
            masks = [
                visible_mask(last.to(device), capacity=each, window=window, group=rows, dtype=dtype)[0]
                for each in (columns, capacity)
            ]
            short = _attend(q, k[:, :, :columns], v[:, :, :columns], masks[0], size**-0.5)
            whole = _attend(q, k, v, masks[1], size**-0.5)
            same = same and all(torch.equal(*pair) for pair in zip(short, whole, strict=True))
        if same:
            good.append(columns)
    return (*good, capacity)


def _candidates(capacity: int) -> list[int]:
    """Multiples of a block up to eight, of eight blocks up to 64, then doubling: few, so that measuring is quick."""
    counts = [COLUMN_BLOCK * blocks for blocks in (*range(1, 9), *range(16, 65, 8))]
    while counts[-1] < capacity:
        counts.append(2 * counts[-1])
    return [count for count in counts if count < capacity]


def _whole_blocks(rows: int) -> int:
    return -(-rows // ROW_BLOCK) * ROW_BLOCK


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, K, R, D], keys and values [B, K, m, D], mask [B, 1, R, m] -> (out like query, lse [B, K, R])."""
    if query.device.type == "cpu":
        out, lse = _kernel(query, keys, values, 0.0, False, attn_mask=mask, scale=scale)
        return out, lse
    return plain_products(query, keys, values, mask, scale)


def plain_products(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel does, where there is none: query [B, K, n, D], keys and values [B, K, m, D], mask [B, 1, n, m].

    Scores and sums are made in float32 at least, a few batch elements at a time: as many as the shapes allow, whatever
    they hold, so an element's bits stay its own. Returns (out [B, K, n, D] in query's type, lse [B, K, n]).
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    element_bytes = 2 * keys[0].numel() * wide.itemsize
    outs, lses = [], []
    for part in torch.arange(query.shape[0]).split(max(1, WIDE_BYTES // max(1, element_bytes))):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        scores = query[rows].to(wide) @ keys[rows].to(wide).transpose(-1, -2) * scale + mask[rows].to(wide)
        lse = torch.logsumexp(scores, -1)
        weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
        outs.append((weights @ values[rows].to(wide)).to(query.dtype))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)
