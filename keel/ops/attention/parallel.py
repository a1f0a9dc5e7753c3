"""Attention with sinks where keys (a ring) or heads (Ulysses) lie on several ranks, as pure functions of tensors.

A ring's rank holds a stretch of a packed row's queries and sees the stretches of keys one after the other. Each gives a
plain (out, lse); `merge_parts` makes the whole of them, and the sink is added once, at the end. Backward, every part's
kernel is handed the whole's (out', lse') with the sink in it, and the gradients add up:

    forward     parts = [forward(q, k_r, v_r, part_layout(...)) for r in ranks]
                out, lse = apply_sinks(*merge_parts(parts), sinks)
    backward    dq = sum of dq_r, (dk_r, dv_r) go home,   from backward(grad, q, k_r, v_r, out, lse, layout_r)
                ds = sinks_gradient(grad, out, lse, sinks), summed over the ranks

A part that a row does not see, because it lies in the future, beyond the window or in another sequence, is (0, -inf)
there, and changes nothing. With heads split instead, every rank has whole sequences and its own heads' sinks:
`split_heads`. Merging: Liu et al., "Ring Attention with Blockwise Transformers", 2023, arXiv:2310.01889; heads: Jacobs
et al., "DeepSpeed Ulysses", 2023, arXiv:2309.14509.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from keel.ops.attention.layout import Layout, Span, build_layout


def part_layout(
    cu_seqlens: torch.Tensor, window: int | None, queries: tuple[int, int], keys: tuple[int, int]
) -> Layout:
    """What the packed rows `queries` (first, one past the last) see of the packed rows `keys`: one part of a ring.

    `cu_seqlens` [S + 1] and `window` are those of the whole row. Raises ValueError if a stretch leaves the packed row.
    """
    bounds = [int(bound) for bound in cu_seqlens.tolist()]
    for first, last in (queries, keys):
        if not 0 <= first <= last <= bounds[-1]:
            raise ValueError(
                f"rows {first} to {last} leave the {bounds[-1]} packed rows; give (first, one past the last)"
            )
    spans = []
    for start, stop in pairwise(bounds):
        query_first, query_last = max(start, queries[0]), min(stop, queries[1])
        key_first, key_last = max(start, keys[0]), min(stop, keys[1])
        if query_first < query_last and key_first < key_last:
            spans.append(
                Span(
                    query_first - queries[0],
                    query_last - query_first,
                    key_first - keys[0],
                    key_last - key_first,
                    query_first - key_first,
                )
            )
    return build_layout(tuple(spans), window, queries[1] - queries[0], keys[1] - keys[0])


def merge_parts(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain (out [T, H, D], lse [T, H]) of each part of the keys -> those of all keys; no sink is in them.

    Sums are made in the type of lse, in the order of the parts. A row that sees nothing of any part stays (0, -inf).
    Raises ValueError if there is no part.
    """
    if not parts:
        raise ValueError("merge_parts: got no part; a ring has at least one")
    lse = torch.logsumexp(torch.stack([part_lse for _, part_lse in parts]), 0)
    seen = lse.masked_fill(lse == float("-inf"), 0.0)  # (-inf) - (-inf) is no number
    out = sum(part * torch.exp(part_lse - seen).unsqueeze(-1) for part, part_lse in parts)
    assert isinstance(out, torch.Tensor)
    return out.to(parts[0][0].dtype), lse


def split_heads(num_heads: int, num_kv_heads: int, rank: int, num_ranks: int) -> tuple[slice, slice]:
    """Which query heads (of q, of the sinks and of the output) and which key heads are rank `rank`'s.

    With fewer key heads than ranks, ranks that share one all have it, and their gradients of it add up. Raises
    ValueError if query heads do not divide among the ranks, or key heads neither do nor divide them.
    """
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must be 0 to {num_ranks - 1}, got {rank}")
    if num_heads % num_ranks or (num_kv_heads % num_ranks and num_ranks % num_kv_heads):
        raise ValueError(
            f"{num_heads} query heads and {num_kv_heads} key heads cannot be split over {num_ranks} ranks; use a "
            "number of ranks that divides the query heads, and divides or is divided by the key heads"
        )
    each = num_heads // num_ranks
    kv_each = max(1, num_kv_heads // num_ranks)
    first_kv = rank * num_kv_heads // num_ranks
    return slice(rank * each, (rank + 1) * each), slice(first_kv, first_kv + kv_each)
