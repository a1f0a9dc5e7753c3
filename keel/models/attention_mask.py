"""What a `transformers` model's mask means for attention that never builds a [T, T] mask.

`transformers` asks the registered mask function once per forward pass and layer type, and hands its answer to every
layer. Ours is a tagged [B, 1, 1, keys] tensor (a tensor, because models and `generate` pass nothing else on as it is)
that carries a `MaskPlan`: offsets of the cache, the 2D padding mask, the window. The plan becomes spans (which keys
each sequence's queries may see), once, when the first layer needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function

from keel.ops.attention import Layout, Span, build_layout

_TAG = "_keel_mask_plan"


class AttentionMaskError(ValueError):
    """A mask or an argument that "keel" attention cannot honour exactly; ignoring it would be silently wrong."""


@dataclass(slots=True)
class MaskPlan:
    """Row b's query i stands at position `query_offset + i`, its key j at `key_offset + j`.

    `padding` [B, positions] is True where a token is real, None if nothing was said. `sees` is the mask as a function
    of (batch, head, query position, key position), None if it is plainly causal with the window; it is only asked at
    the borders of what we are about to compute.
    """

    batch: int
    num_queries: int
    num_keys: int
    query_offset: int = 0
    key_offset: int = 0
    window: int | None = None
    padding: torch.Tensor | None = None
    sees: Callable[..., Any] | None = None
    device: torch.device | str | None = None
    _layouts: dict[int, tuple[torch.Tensor | None, Layout]] = field(default_factory=dict)

    def layout(self, position_ids: torch.Tensor | None) -> Layout:
        """Spans over rows [B * num_queries] and keys [B * num_keys]; the same object for every layer of a pass."""
        if not self._resets_matter(position_ids):
            position_ids = None
        found = self._layouts.get(id(position_ids))
        if found is None:  # the tensor is kept, so that its id stays its own
            found = self._layouts[id(position_ids)] = (position_ids, self._build(position_ids))
        return found[1]

    def _resets_matter(self, position_ids: torch.Tensor | None) -> bool:
        """Packed sequences may be told by positions that restart, if no mask was given and there is no cache."""
        no_cache = self.query_offset == 0 and self.key_offset == 0 and self.num_keys == self.num_queries
        return position_ids is not None and position_ids.dim() == 2 and self.padding is None and no_cache

    def _build(self, position_ids: torch.Tensor | None) -> Layout:
        starts = self._sequence_starts()
        if position_ids is not None:
            steps = position_ids.to(starts.device).diff(dim=1) != 1
            starts = starts.clone()
            starts[:, 1:] |= steps.expand(self.batch, -1)
        spans: list[Span] = []
        for row, (first, last) in enumerate(self._real_positions()):
            bounds = [i + self.query_offset for i in starts[row].nonzero().reshape(-1).tolist()]
            for low, high in zip([0, *bounds], [*bounds, self.query_offset + self.num_queries], strict=True):
                spans.extend(self._span(row, max(low, first), min(high, last)))
        return build_layout(tuple(spans), self.window, self.batch * self.num_queries, self.batch * self.num_keys)

    def _span(self, row: int, low: int, high: int) -> list[Span]:
        """The span of the real tokens of one sequence, which lie at positions `low` to `high - 1` of row `row`."""
        first_query, first_key = max(low, self.query_offset), max(low, self.key_offset)
        num_queries = high - first_query
        num_keys = min(high, self.key_offset + self.num_keys) - first_key
        if num_queries <= 0 or num_keys <= 0:
            return []
        query_start = row * self.num_queries + first_query - self.query_offset
        key_start = row * self.num_keys + first_key - self.key_offset
        return [Span(query_start, num_queries, key_start, num_keys, first_query - first_key)]

    def _real_positions(self) -> list[tuple[int, int]]:
        """Per row: the first real position and one past the last. Raises AttentionMaskError if there are holes."""
        end = self.query_offset + self.num_queries
        if self.padding is None:
            return [(0, end)] * self.batch
        real = self.padding[:, :end].to(torch.int64)
        counts = real.sum(1)
        first = real.argmax(1)
        last = torch.where(counts > 0, real.shape[1] - real.flip(1).argmax(1), first)
        if not torch.equal(last - first, counts):
            row = int((last - first != counts).nonzero()[0])
            raise AttentionMaskError(
                f"keel attention takes padding on the left or the right; row {row} of attention_mask has padding "
                "between real tokens. Remove it, or load the model with attn_implementation='eager'"
            )
        return list(zip(first.tolist(), last.tolist(), strict=True))

    def _sequence_starts(self) -> torch.Tensor:
        """[B, queries] bool: where the mask says a new packed sequence starts, after asking it at every border.

        For each query four keys are asked about: itself, the next one, the oldest it may see and the one before that.
        """
        starts = torch.zeros(self.batch, self.num_queries, dtype=torch.bool)
        if self.sees is None:
            return starts
        device = self.device
        row = torch.arange(self.batch, device=device)[:, None]
        query = torch.arange(self.num_queries, device=device)[None, :] + self.query_offset
        query = query.expand(self.batch, -1)
        if self.window != 1:  # with a window of 1 nothing but the token itself is seen, packed or not
            starts = ~self._asked(row, query, query - 1, True)
            starts[:, 0] = False
        starts = starts.to(device)
        oldest = torch.where(starts, query, 0).cummax(1).values
        if self.window is not None:
            oldest = torch.maximum(oldest, query - self.window + 1)
        right = self._asked(row, query, query, True) & ~self._asked(row, query, query + 1, False)
        right &= self._asked(row, query, oldest, True) & ~self._asked(row, query, oldest - 1, False)
        if not bool(right.all()):
            raise AttentionMaskError(
                "keel attention is causal, over whole sequences, with an optional sliding window; this model asks for "
                "another mask (bidirectional, blockwise, or chunked over a cache). Use attn_implementation='eager'"
            )
        return starts.cpu()

    def _asked(self, row: torch.Tensor, query: torch.Tensor, key: torch.Tensor, outside: bool) -> torch.Tensor:
        """Does the mask let `query` see `key`? `outside` where there is no such key."""
        inside = (key >= self.key_offset) & (key < self.key_offset + self.num_keys)
        assert self.sees is not None
        answer = self.sees(row, torch.zeros_like(row), query, torch.where(inside, key, query))
        return torch.where(inside, answer, outside)


# What it returns carries a plan, which a traced graph would lose.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def keel_mask(  # noqa: PLR0917 - transformers' signature
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str | None = None,
    **_unused: Any,
) -> torch.Tensor:
    """The mask function registered with `transformers`: a [B, 1, 1, keys] tensor that carries a `MaskPlan`.

    Raises AttentionMaskError for masks made of custom functions and for anything but a 2D padding mask.
    """
    if use_vmap:
        raise AttentionMaskError(
            "keel attention cannot honour a custom mask function (or_mask_function, and_mask_function): it never "
            "builds the mask. Load the model with attn_implementation='eager' or 'sdpa'"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise AttentionMaskError(
            f"keel attention takes a 2D padding mask [batch, positions], got {list(attention_mask.shape)}; pass "
            "cu_seq_lens_q or position_ids for packed sequences, or use attn_implementation='eager'"
        )
    plan = MaskPlan(
        batch=batch_size,
        num_queries=q_length,
        num_keys=kv_length,
        query_offset=int(q_offset),  # read now: a static cache counts on in place before the layer runs
        key_offset=int(kv_offset),
        window=local_size,
        padding=None if attention_mask is None else attention_mask.to(torch.bool),
        sees=None if mask_function is causal_mask_function and local_size is None else mask_function,
        device=device,
    )
    # Contiguous, because `generate` calls contiguous() on it, and a copy would have lost the plan.
    mask = torch.ones(batch_size, 1, 1, kv_length, dtype=torch.bool, device=device)
    setattr(mask, _TAG, plan)
    return mask


def plan_of(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, window: int | None) -> MaskPlan:
    """The plan behind the mask a layer was given. Raises AttentionMaskError for any other mask than ours."""
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        if num_queries != num_keys:
            raise AttentionMaskError(
                f"keel attention got {num_queries} queries, {num_keys} keys and no mask, so it cannot know where the "
                "queries stand. Let the model make its masks, or pass keel_cache"
            )
        return MaskPlan(batch, num_queries, num_keys, window=window)
    plan: MaskPlan | None = getattr(mask, _TAG, None)
    if plan is None:
        raise AttentionMaskError(
            f"keel attention cannot honour a ready-made mask of shape {list(mask.shape)}: it never builds the mask. "
            "Pass a 2D padding mask, cu_seq_lens_q or position_ids, or use attn_implementation='eager'"
        )
    if (plan.batch, plan.num_queries, plan.num_keys) != (batch, num_queries, num_keys):
        raise AttentionMaskError(
            f"keel attention: the mask is for {plan.batch} rows, {plan.num_queries} queries and {plan.num_keys} keys, "
            f"the layer has {batch}, {num_queries} and {num_keys}; a cache that returns other keys than it announces "
            "is not supported, use a DynamicCache or StaticCache"
        )
    if window is not None and window != plan.window:
        raise AttentionMaskError(
            f"keel attention: the layer's window is {window}, its mask's is {plan.window}; they must agree"
        )
    return plan
