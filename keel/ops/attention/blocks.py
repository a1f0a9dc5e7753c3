"""Attention without sinks in plain torch products, a block of query rows at a time: float32 and float64 on any device.

The stock kernels for CUDA take bfloat16 and float16 only, so this is what a float32 model runs there: exact to
rounding, without a [T, T] matrix, but computing what a causal mask hides inside a block. It is for checks and small
models. Sequences are taken one by one with shapes of their own, and sums over blocks are made in order, so a
sequence's bits do not depend on the others and a second pass repeats them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from keel.ops.attention.layout import Layout

ROW_BLOCK = 128
"""Query rows per block: at 64 heads and 4,096 keys a block's scores are 128 MiB of float32."""

Block = tuple[slice, slice, torch.Tensor]
"""Rows of q, rows of k, and which of them see which, [n, m] bool."""


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, H, D], k and v [T', K, D] -> out [T, H, D] and lse [T, H], both in q's type."""
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:2], float("-inf"))
    for rows, keys, visible in _blocks(layout, q.device):
        scores = _scores(q[rows], k[keys], visible, scale)
        block_lse = torch.logsumexp(scores, -1)  # [K, G, n]
        weights = _exp_difference(scores, block_lse)
        out[rows] = _ungrouped(_times_keys(weights, v[keys]))
        lse[rows] = block_lse.flatten(0, 1).t()
    return out, lse


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: Layout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, from the `out` and `lse` handed in (with a sink in them, or another part of a ring).

    P = exp(S - lse), delta = rowsum(grad * out), dS = P * (grad v^T - delta), as in FlashAttention-2 (Dao 2023,
    arXiv:2307.08691).
    """
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    num_kv_heads = k.shape[1]
    for rows, keys, visible in _blocks(layout, q.device):
        weights = _exp_difference(
            _scores(q[rows], k[keys], visible, scale), _grouped(lse[rows, :, None], num_kv_heads).squeeze(-1)
        )
        gradient = _grouped(grad[rows], num_kv_heads)  # [K, G, n, D]
        delta = (gradient * _grouped(out[rows], num_kv_heads)).sum(-1, keepdim=True)
        dscores = weights * (_times_values(gradient, v[keys]) - delta) * scale
        dq[rows] = _ungrouped(_times_keys(dscores, k[keys]))
        dk[keys] += _over_rows(dscores, _grouped(q[rows], num_kv_heads))
        dv[keys] += _over_rows(weights, gradient)
    return dq, dk, dv


def _blocks(layout: Layout, device: torch.device) -> Iterator[Block]:
    """Blocks of rows of which at least one sees a key."""
    for span in layout.spans:
        for start in range(0, span.num_queries, ROW_BLOCK):
            stop = min(start + ROW_BLOCK, span.num_queries)
            oldest = 0 if layout.window is None else max(0, span.offset + start - layout.window + 1)
            newest = min(span.num_keys, span.offset + stop)
            if newest <= oldest:
                continue
            positions = torch.arange(start, stop, device=device)[:, None] + span.offset
            distance = positions - torch.arange(oldest, newest, device=device)
            visible = distance >= 0
            if layout.window is not None:
                visible &= distance < layout.window
            rows = slice(span.query_start + start, span.query_start + stop)
            yield rows, slice(span.key_start + oldest, span.key_start + newest), visible


def _scores(q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor, scale: float) -> torch.Tensor:
    """q [n, H, D], k [m, K, D] -> scaled products [K, G, n, m], -inf where nothing is seen."""
    return (_times_values(_grouped(q, k.shape[1]), k) * scale).masked_fill_(~visible, float("-inf"))


def _exp_difference(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """exp(scores - lse), zero in rows that see nothing, whose lse is -inf."""
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))


def _grouped(rows: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[n, H, D] -> [K, G, n, D]: the query heads of each key head."""
    grouped: torch.Tensor = rows.transpose(0, 1).unflatten(0, (num_kv_heads, -1))
    return grouped


def _ungrouped(rows: torch.Tensor) -> torch.Tensor:
    """[K, G, n, D] -> [n, H, D]."""
    return rows.flatten(0, 1).transpose(0, 1)


def _times_values(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[K, G, n, D] with rows of right [m, K, D] -> their products [K, G, n, m]."""
    return left @ right.permute(1, 2, 0).unsqueeze(1)


def _times_keys(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Weights [K, G, n, m] of rows [m, K, D] -> sums [K, G, n, D]."""
    return weights @ rows.transpose(0, 1).unsqueeze(1)


def _over_rows(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sum over the queries of a key head: weights [K, G, n, m], rows [K, G, n, D] -> [m, K, D]."""
    return (weights.flatten(1, 2).transpose(1, 2) @ rows.flatten(1, 2)).transpose(0, 1)
