"""How ragged sequences become a few rectangular kernel calls, computed once and shared by all layers.

A `Span` says which keys one sequence's queries may see. A `Layout` cuts spans into pieces and puts pieces of one
padded shape into a `Bucket`, which is one kernel call:

    no window     one piece per sequence, causal; of a sequence whose first keys are there already, blocks of at most
                  `MAX_BLOCK` rows, because the causal flag cannot say what they see and a mask must.
    window W      the first rows see at most W keys: a causal piece. Later rows are cut into blocks of about W rows,
                  and a block of n rows sees n + W - 1 keys: a band. Work and memory grow as T * W, no [T, T] exists.

Pieces are padded on the right to a multiple of `ROW_TILE` rows, never to the longest neighbour, so a sequence's result
has the same bits whatever else is in the micro-batch. Rows that see no key are in no piece at all: they come out as
(0, -inf) without any kernel having a say in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch

ROW_TILE = 16
"""Pieces are padded to a multiple of this. At 70 tokens 16 costs nothing, the kernel's own block of 32 a third."""
MIN_BLOCK = 32
"""Smallest block of a windowed piece: the kernel's own row block. Smaller ones would pay its start-up cost per row."""
MAX_BLOCK = 512
"""Largest: a band's mask holds block * (block + window) elements."""
UNCUT_ROWS = 128
"""A windowed sequence up to here (or two windows) is one causal piece with a band mask: quicker than several."""
_KEPT_BOUNDS = "_keel_bounds"


class AttentionBackendError(RuntimeError):
    """No backend can do what was asked; nothing else is tried in its place."""


@dataclass(frozen=True, slots=True)
class Span:
    """Queries `query_start ...` and keys `key_start ...` of one sequence; query i stands at key position `offset + i`.

    Query i sees key j if `j <= offset + i` and `offset + i - j < window`. Self-attention over whole sequences has
    `offset` 0; a key-value cache has `offset` = keys before the first query; a ring's part may have a negative one.
    """

    query_start: int
    num_queries: int
    key_start: int
    num_keys: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Bucket:
    """`P` pieces of one padded shape: `L` query rows and `M` key rows each, laid end to end by the index tensors."""

    num_pieces: int
    query_index: torch.Tensor  # [P * L] int64, row of q; padding repeats the piece's last row
    key_index: torch.Tensor  # [P * M] int64, row of k and v; likewise
    padded_queries: torch.Tensor | None  # [P * L] bool, True on padding; None if there is none
    offset: int
    num_keys: int  # real keys before padding if the band reaches past them, else M
    window: int | None  # None if it hides nothing here
    query_run: slice | None  # these rows of q are what `query_index` says, so nothing need be gathered
    key_run: slice | None
    masks: dict[torch.dtype, torch.Tensor | None] = field(default_factory=dict, compare=False)

    @property
    def causal(self) -> bool:
        """Can the kernel's own causal flag (which aligns query 0 with key 0) do the upper half of the mask?"""
        return self.offset == 0

    def mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """What the causal flag does not hide, as an additive [L, M] mask of the kernel's type; None if nothing."""
        if self.window is None:
            return self._plain_mask(dtype)
        if dtype not in self.masks:
            rows = self.query_index.shape[0] // self.num_pieces
            columns = self.key_index.shape[0] // self.num_pieces
            distance = torch.arange(rows)[:, None] + self.offset - torch.arange(columns)
            visible = (distance >= 0) & (distance < self.window) & (torch.arange(columns) < self.num_keys)
            self.masks[dtype] = torch.zeros(rows, columns, dtype=dtype).masked_fill_(~visible, float("-inf"))
        return self.masks[dtype]

    def _plain_mask(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The same without a window: quickly made, and kept nowhere, because it grows with the sequence."""
        rows = self.query_index.shape[0] // self.num_pieces
        columns = self.key_index.shape[0] // self.num_pieces
        if self.causal and self.num_keys == columns:
            return None
        mask = torch.full((rows, columns), float("-inf"), dtype=dtype).triu_(self.offset + 1)
        mask[:, self.num_keys :] = float("-inf")
        return mask


@dataclass(frozen=True, slots=True)
class Layout:
    """All of a micro-batch's pieces for one window, and where every row's result lies in the buckets' output."""

    spans: tuple[Span, ...]
    window: int | None
    num_query_rows: int  # T
    num_key_rows: int  # T, unless keys and queries differ
    buckets: tuple[Bucket, ...]
    query_rows: torch.Tensor | None  # [R] int64, rows with a visible key; None: all T of them, in order
    query_slots: torch.Tensor  # [R] int64, where row `query_rows[r]` lies in the concatenated buckets
    key_slots: torch.Tensor | None  # [T] int64, likewise for keys; None if a key is in several pieces or in none
    queries_in_order: bool  # the concatenated buckets are the T query rows, in order
    keys_in_order: bool

    @property
    def max_queries(self) -> int:
        return max((span.num_queries for span in self.spans), default=0)


def packed_layout(cu_seqlens: torch.Tensor, window: int | None) -> Layout:
    """The layout of self-attention over packed sequences; `cu_seqlens` [S + 1] as in `MicroBatch`.

    Cached by content, so that all layers, the recomputation of a checkpointed layer and the score pass share one.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be [S + 1], got shape {tuple(cu_seqlens.shape)}")
    return _packed_layout(_bounds(cu_seqlens), window)


def _bounds(cu_seqlens: torch.Tensor) -> tuple[int, ...]:
    """Its values. Off the CPU reading them waits for all work under way, so it is done once, not in every layer."""
    if cu_seqlens.device.type == "cpu" or cu_seqlens.is_inference():  # an inference tensor counts no versions
        return tuple(cu_seqlens.tolist())
    kept: tuple[int, tuple[int, ...]] | None = getattr(cu_seqlens, _KEPT_BOUNDS, None)
    if kept is None or kept[0] != cu_seqlens._version:
        kept = (cu_seqlens._version, tuple(cu_seqlens.tolist()))
        setattr(cu_seqlens, _KEPT_BOUNDS, kept)
    return kept[1]


@lru_cache(maxsize=64)
def _packed_layout(bounds: tuple[int, ...], window: int | None) -> Layout:
    if bounds[0] != 0 or any(after < before for before, after in pairwise(bounds)):
        raise ValueError(f"cu_seqlens must start at 0 and never fall, got {bounds[:8]}...; pass row starts and T")
    spans = tuple(Span(start, stop - start, start, stop - start) for start, stop in pairwise(bounds) if stop > start)
    return build_layout(spans, window, bounds[-1], bounds[-1])


@lru_cache(maxsize=64)
def build_layout(spans: tuple[Span, ...], window: int | None, num_query_rows: int, num_key_rows: int) -> Layout:
    """The layout of any spans. Query rows that are in no span see nothing; spans must not share query rows.

    Raises ValueError on a window below 1 and on spans that leave the rows.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a token sees itself), got {window}; None is no window")
    for span in spans:
        _check_span(span, num_query_rows, num_key_rows)
    groups: dict[tuple[int, int, int], list[Span]] = {}
    for span in spans:
        for piece in _pieces(span, window):
            reach = piece.offset + piece.num_queries
            short_keys = piece.num_keys if piece.num_keys < reach else 0
            key = (piece.offset, _round_up(piece.num_queries), short_keys)
            groups.setdefault(key, []).append(piece)
    buckets = tuple(_bucket(pieces, key, window) for key, pieces in sorted(groups.items()))
    return _with_slots(spans, window, num_query_rows, num_key_rows, buckets)


def _check_span(span: Span, num_query_rows: int, num_key_rows: int) -> None:
    lowest = min(span.query_start, span.key_start, span.num_queries, span.num_keys)
    spare_queries = num_query_rows - span.query_start - span.num_queries
    spare_keys = num_key_rows - span.key_start - span.num_keys
    if min(lowest, spare_queries, spare_keys) < 0:
        raise ValueError(f"{span} leaves the {num_query_rows} query rows or {num_key_rows} key rows there are")


def _round_up(rows: int) -> int:
    return -(-rows // ROW_TILE) * ROW_TILE


def _pieces(span: Span, window: int | None) -> Iterator[Span]:
    """Cut a span into kernel-sized spans in which every query sees at least one key."""
    first = max(0, -span.offset)
    last = span.num_queries
    if window is not None:
        last = min(last, span.num_keys - span.offset + window - 1)
    if last <= first or span.num_keys == 0:
        return
    for start, stop in _cuts(first, last, window, span.offset):
        oldest = 0 if window is None else max(0, span.offset + start - window + 1)
        newest = min(span.num_keys, span.offset + stop)
        yield Span(
            span.query_start + start,
            stop - start,
            span.key_start + oldest,
            newest - oldest,
            span.offset + start - oldest,
        )


def _cuts(first: int, last: int, window: int | None, offset: int) -> Iterator[tuple[int, int]]:
    """Row ranges of one piece each, about `window` rows; only the last may fill its row tiles badly."""
    if window is None and offset + first > 0:
        for start in range(first, last, MAX_BLOCK):
            yield start, min(start + MAX_BLOCK, last)
        return
    if window is None or offset + last <= max(window, min(max(UNCUT_ROWS, 2 * window), 2 * MAX_BLOCK)):
        yield first, last
        return
    if window > MAX_BLOCK and offset + first < window:
        yield first, window - offset  # these rows see all keys before them: causal, no mask, one piece
        first = window - offset
    block = min(_round_up(max(window, MIN_BLOCK)), MAX_BLOCK)
    for start in range(first, last, block):
        yield start, min(start + block, last)


def _bucket(pieces: Sequence[Span], key: tuple[int, int, int], window: int | None) -> Bucket:
    offset, rows, short_keys = key
    columns = offset + rows
    query_index, padded = _index([p.query_start for p in pieces], [p.num_queries for p in pieces], rows)
    key_index, _ = _index([p.key_start for p in pieces], [p.num_keys for p in pieces], columns)
    longest = max(piece.num_queries for piece in pieces)
    hides = window is not None and offset + longest > window
    return Bucket(
        num_pieces=len(pieces),
        query_index=query_index,
        key_index=key_index,
        padded_queries=padded if bool(padded.any()) else None,
        offset=offset,
        num_keys=short_keys or columns,
        window=window if hides else None,
        query_run=_run(query_index),
        key_run=_run(key_index),
    )


def _run(index: torch.Tensor) -> slice | None:
    """The slice that `index` [n] spells out, if it does."""
    first = int(index[0])
    return slice(first, first + len(index)) if torch.equal(index, torch.arange(len(index)) + first) else None


def _index(starts: list[int], lengths: list[int], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers [P * rows] and whether each is padding; padding repeats the last real row, so it stays finite."""
    length = torch.tensor(lengths)[:, None]
    step = torch.arange(rows)[None, :]
    index = torch.tensor(starts)[:, None] + torch.minimum(step, length - 1)
    return index.reshape(-1), (step >= length).reshape(-1)


def _with_slots(
    spans: tuple[Span, ...], window: int | None, num_query_rows: int, num_key_rows: int, buckets: tuple[Bucket, ...]
) -> Layout:
    slots = torch.full((num_query_rows,), -1)
    uses = torch.zeros(num_key_rows, dtype=torch.int64)
    key_slots = torch.zeros(num_key_rows, dtype=torch.int64)
    query_base = key_base = 0
    for bucket in buckets:
        steps = torch.arange(bucket.query_index.shape[0])
        real = steps if bucket.padded_queries is None else steps[~bucket.padded_queries]
        slots[bucket.query_index[real]] = real + query_base
        # Padding repeats a row, so a row's first slot is the real one; only real slots count as uses.
        first = torch.ones_like(bucket.key_index, dtype=torch.bool)
        first[1:] = bucket.key_index[1:] != bucket.key_index[:-1]
        columns = bucket.key_index.shape[0] // bucket.num_pieces
        first[::columns] = True
        real_keys = torch.arange(bucket.key_index.shape[0])[first]
        uses.index_add_(0, bucket.key_index[real_keys], torch.ones_like(real_keys))
        key_slots[bucket.key_index[real_keys]] = real_keys + key_base
        query_base += bucket.query_index.shape[0]
        key_base += bucket.key_index.shape[0]
    covered = slots >= 0
    rows = None if bool(covered.all()) else covered.nonzero().reshape(-1)
    once = bool((uses == 1).all())
    return Layout(
        spans=spans,
        window=window,
        num_query_rows=num_query_rows,
        num_key_rows=num_key_rows,
        buckets=buckets,
        query_rows=rows,
        query_slots=slots if rows is None else slots[rows],
        key_slots=key_slots if once else None,
        queries_in_order=query_base == num_query_rows and torch.equal(slots, torch.arange(num_query_rows)),
        keys_in_order=once and key_base == num_key_rows and torch.equal(key_slots, torch.arange(num_key_rows)),
    )
