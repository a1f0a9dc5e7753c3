"""What a pass computes of a micro-batch whose sequences begin alike: every row with its own past once.

A row is computed for all rows that have the same token, the same past and the same replayed experts. Queries are the
computed rows; the keys of a sequence are gathered from those of its ancestors, so a kernel sees an ordinary sequence
whose first queries are missing. Everything the pass says is told of all rows again, in their order.

The head is told of rows, not of computed ones: the last row that two sequences share predicts another token in each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from keel.models.info import ModelInfo
from keel.ops.attention.layout import Layout, Span, build_layout
from keel.prefixes import PrefixPlan, plan_prefixes

if TYPE_CHECKING:
    from keel.batch import MicroBatch

Share = Literal["auto", "on", "off"]
LEAST_SHARE = 0.1
"""Share of the rows that must be saved for "auto" to share: below, what it costs is of the size of what it saves."""


@dataclass(frozen=True)
class SharedRows:
    """Of a micro-batch of T rows: the U that are computed, and where the others find theirs."""

    computed: torch.Tensor  # [U] int64, the row of the micro-batch that each computed one is
    row_to_computed: torch.Tensor  # [T] int64
    told: torch.Tensor  # [P] int64, rows whose label the head tells of
    row_to_told: torch.Tensor  # [T] int64, where among these a row's log-prob is
    attention: SharedAttention

    @property
    def num_shared(self) -> int:
        """Rows that are not computed."""
        return int(self.row_to_computed.shape[0] - self.computed.shape[0])


@dataclass(frozen=True)
class SharedAttention:
    """What attention needs to know: which keys each sequence's computed rows see. Handed to it as `keel_shared`."""

    spans: tuple[Span, ...]
    key_rows: torch.Tensor  # [M] int64, the computed row of each key
    num_rows: int  # U, or more with padding, which is in no span
    layers: set[int] = field(default_factory=set, compare=False)
    """Layers that have asked; one that does not ask would take computed rows for neighbours."""

    def layout(self, window: int | None) -> Layout:
        """Queries are computed rows, keys `key_rows`."""
        return build_layout(self.spans, window, self.num_rows, int(self.key_rows.shape[0]))


def sharing_problem(model: nn.Module, info: ModelInfo) -> str:
    """Why what sequences have in common cannot be computed once by a `transformers` model; "" if it can."""
    config: Any = model.config
    if config._attn_implementation != "keel":
        return f"attention = {config._attn_implementation!r} cannot gather keys; set model.attention = 'keel'"
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"{info.model_type} has layers of {', '.join(other)}, in which a row knows more of its past than keys"
    attending = sum(1 for each in model.modules() if hasattr(each, "layer_idx") and hasattr(each, "is_causal"))
    return "" if attending == info.num_layers else f"{attending} of {info.num_layers} layers are known to attend"


def share_rows(micro_batch: MicroBatch, routes: torch.Tensor | None, share: Share) -> SharedRows | None:
    """What is computed of `micro_batch` while `routes [T, layers, k]` are replayed (None: none are).

    None if nothing is shared, or too little for "auto". The same rows are shared by every pass over a batch: choices
    that a score pass made are those of the shared row, and rows that an engine routed differently are kept apart.
    """
    if share == "off" or micro_batch.num_sequences < 2:
        return None
    engines = None if routes is None or routes is micro_batch.routed_experts else micro_batch.routed_experts
    plan = _plan(micro_batch, [each for each in (engines, routes, _unusual_positions(micro_batch)) if each is not None])
    saved = sum(plan.shared)
    if saved == 0 or (share == "auto" and saved < LEAST_SHARE * micro_batch.num_tokens):
        return None
    return _shared_rows(plan, micro_batch)


def _unusual_positions(micro_batch: MicroBatch) -> torch.Tensor | None:
    """The positions, if they are not what the place in the sequence says already."""
    starts = micro_batch.cu_seqlens[:-1].long()[micro_batch.row_to_sequence]
    usual = torch.arange(micro_batch.num_tokens, device=starts.device) - starts
    return None if torch.equal(usual, micro_batch.positions) else micro_batch.positions


def _plan(micro_batch: MicroBatch, also: Sequence[torch.Tensor]) -> PrefixPlan:
    """Found again by content, because all passes over a micro-batch ask for it. `also [T, ...]` tell rows apart too."""
    parts = [_bytes(each) for each in (micro_batch.input_ids, micro_batch.cu_seqlens, *also)]
    key = hashlib.blake2b(b"".join(parts), digest_size=32, key=repr(list(map(len, parts))).encode()[:64]).digest()
    if key not in _plans:
        while len(_plans) >= KEPT_PLANS:
            _plans.pop(next(iter(_plans)), None)
        symbols: Sequence[Any] = micro_batch.input_ids.tolist()
        if also:
            symbols = list(zip(symbols, *(_rows_of(part, len(symbols)) for part in parts[2:]), strict=True))
        bounds = micro_batch.cu_seqlens.tolist()
        _plans[key] = plan_prefixes(symbols[start:stop] for start, stop in pairwise(bounds))
    return _plans[key]


KEPT_PLANS = 64
_plans: dict[bytes, PrefixPlan] = {}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def _rows_of(data: bytes, num_rows: int) -> Iterator[bytes]:
    size = len(data) // max(num_rows, 1)
    return (data[start : start + size] for start in range(0, len(data), size))


def _shared_rows(plan: PrefixPlan, micro_batch: MicroBatch) -> SharedRows:
    device = micro_batch.input_ids.device
    nodes = torch.tensor(plan.nodes)
    num_rows = nodes.shape[0]
    lengths, shared = torch.tensor(plan.lengths), torch.tensor(plan.shared)
    starts = lengths.cumsum(0) - lengths
    places = torch.arange(num_rows) - torch.repeat_interleave(starts, lengths, output_size=num_rows)
    left = torch.repeat_interleave(shared, lengths, output_size=num_rows) - places  # rows before the first own one
    computed = (left <= 0).nonzero().reshape(-1)
    twin = computed[nodes]
    told = (left <= 0) | _told_apart(micro_batch, twin.to(device)).cpu()
    slots = told.cumsum(0) - 1
    spans, key_rows = _spans(plan, nodes)
    return SharedRows(
        computed=computed.to(device),
        row_to_computed=nodes.to(device),
        told=told.nonzero().reshape(-1).to(device),
        row_to_told=torch.where(told, slots, slots[twin]).to(device),
        attention=SharedAttention(spans, key_rows.to(device), plan.num_nodes),
    )


def _told_apart(micro_batch: MicroBatch, twin: torch.Tensor) -> torch.Tensor:
    """[T] bool: what is said of a row's label is not what is said of its twin's.

    The loss mask has no say: a correction may change it between the passes over a batch, whose heads must run on the
    same rows to have the same bits.
    """
    apart = (micro_batch.labels != micro_batch.labels[twin]) | (
        micro_batch.temperature != micro_batch.temperature[twin]
    )
    if micro_batch.support_offsets is not None:
        cut = micro_batch.support_offsets.diff() > 0
        apart |= cut | cut[twin]
    if micro_batch.support_missing is not None:
        apart |= micro_batch.support_missing | micro_batch.support_missing[twin]
    return apart


def _spans(plan: PrefixPlan, nodes: torch.Tensor) -> tuple[tuple[Span, ...], torch.Tensor]:
    """Each sequence's own rows as queries, all of its rows as keys; a sequence without own rows asks nothing."""
    spans: list[Span] = []
    keys: list[torch.Tensor] = []
    queries, num_keys = 0, 0
    ends = list(accumulate(plan.lengths))
    for length, shared, end in zip(plan.lengths, plan.shared, ends, strict=True):
        if length == shared:
            continue
        spans.append(Span(queries, length - shared, num_keys, length, shared))
        keys.append(nodes[end - length : end])
        queries, num_keys = queries + length - shared, num_keys + length
    return tuple(spans), torch.cat(keys)
