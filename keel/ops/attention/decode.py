"""Attention of a few new rows over a padded key-value cache: what an engine that samples needs, without gradient.

Grouped heads become rows: the G query heads of a key head are G rows of one small matrix, so each key is read once.
The kernel works on one (batch element, key head) at a time with shapes that depend on n, G and the capacity alone;
an element's result therefore has the same bits whatever the other elements hold, and whatever finite values lie in its
cache beyond what it may see (their weight is exactly zero).
"""

from __future__ import annotations

import torch

from keel.ops.attention.sinks import apply_sinks

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

WIDE_BYTES = 2**28
"""Off the CPU, at most this much of keys and values is held in float32 at a time."""


def visible_mask(
    positions: torch.Tensor, *, capacity: int, window: int | None, group: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What rows at `positions` [B, n] see of a cache; shared by all layers of one window in a forward pass.

    Returns (mask [B, 1, G * n, capacity] of 0 and -inf in `dtype`, empty [B, n] bool: rows that see nothing, which is
    how a negative position marks a row that is not in use). `group` G = query heads / key heads.
    """
    distance = positions[:, :, None] - torch.arange(capacity, device=positions.device)  # [B, n, capacity]
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, float("-inf"))
    return mask.repeat(1, group, 1).unsqueeze(1), hidden.all(-1)


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
    # [B, n, K, G, D] -> [B, K, G * n, D]: row g * n + i is query i of the group's head g.
    query = q.view(batch, rows, kv_heads, group, size).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, size)
    if q.device.type == "cpu":
        out, lse = _kernel(query, k_cache, v_cache, 0.0, False, attn_mask=additive, scale=scale)
    else:
        out, lse = plain_products(query, k_cache, v_cache, additive, scale)
    out = out.reshape(batch, kv_heads, group, rows, size).permute(0, 3, 1, 2, 4).reshape(batch, rows, heads, size)
    lse = lse.reshape(batch, kv_heads, group, rows).permute(0, 3, 1, 2).reshape(batch, rows, heads)
    # The kernel says (0, 0) for a row that sees nothing; nothing seen is (0, -inf).
    return out, lse.masked_fill(empty.unsqueeze(-1), float("-inf"))


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
