"""The plain attention of torch's stock CUDA flash kernels over ragged sequences. It has never heard of sinks.

The kernels take sequences laid end to end and where each starts, share key heads between grouped query heads, and
align the last query with the last key, so a window of W keys is `window_size` (W - 1, 0). Their log-sum-exp is a
natural logarithm, [H, T]. No row without a visible key reaches them: such rows come out as (0, -inf). The backward
kernel recomputes P = exp(S - lse) and delta = rowsum(grad * out) from what it is handed, as the CPU's does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, pairwise

import torch

from keel.ops.attention.layout import AttentionBackendError, Layout, Span

_forward = torch.ops.aten._flash_attention_forward
_backward = torch.ops.aten._flash_attention_backward

HEAD_SIZE_MULTIPLE, MAX_HEAD_SIZE = 8, 256


@dataclass(frozen=True, slots=True)
class Sequences:
    """What the kernels are told of a layout; the rows are None where all of them are used, in order."""

    query_rows: torch.Tensor | None  # [R] int64
    key_rows: torch.Tensor | None  # [R'] int64
    cu_queries: torch.Tensor  # [S + 1] int32
    cu_keys: torch.Tensor  # [S + 1] int32
    max_queries: int
    max_keys: int

    @property
    def lengths(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """In the order in which kernels take them."""
        return self.cu_queries, self.cu_keys, self.max_queries, self.max_keys


KernelForward = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Sequences, int, float], tuple[torch.Tensor, torch.Tensor]
]
"""(q, k, v, sequences, keys seen to the left or -1, scale) -> out [R, H, D], lse [H, R]; rows laid end to end."""
KernelBackward = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""(grad, q, k, v, out, lse [H, R], sequences, keys to the left, scale) -> dq, dk, dv."""


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, H, D], k and v [T', K, D], bfloat16 or float16 -> out [T, H, D] in q's type and lse [T, H] in float32.

    Raises AttentionBackendError for head sizes and spans the kernels cannot do.
    """
    return run_forward(_torch_forward, q, k, v, layout, scale)


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
    """Gradients of q, k and v from the (out, lse) handed in; sums over keys are made in a fixed order."""
    return run_backward(_torch_backward, grad, q, k, v, out, lse, layout, scale)


def run_forward(
    kernel: KernelForward, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` by any kernel that takes sequences laid end to end."""
    refusal = refuses_size(q.shape[-1])
    if refusal is not None:
        raise AttentionBackendError(f"{refusal}; use dtype = 'float32', which needs none of them")
    found = sequences(layout.spans, layout.num_query_rows, layout.num_key_rows, q.device)
    if found is None:
        return torch.zeros_like(q), q.new_full(q.shape[:2], float("-inf"), dtype=torch.float32)
    rows = (_taken(q, found.query_rows), _taken(k, found.key_rows), _taken(v, found.key_rows))
    out, lse = kernel(*rows, found, _window_left(layout), scale)
    return _put(out, found.query_rows, q.shape[0], 0.0), _put(lse.t(), found.query_rows, q.shape[0], float("-inf"))


def run_backward(  # noqa: PLR0917 - a backend's backward, and the kernel
    kernel: KernelBackward,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    layout: Layout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`backward` by any kernel that takes sequences laid end to end."""
    found = sequences(layout.spans, layout.num_query_rows, layout.num_key_rows, q.device)
    if found is None:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dq, dk, dv = kernel(
        _taken(grad, found.query_rows),
        _taken(q, found.query_rows),
        _taken(k, found.key_rows),
        _taken(v, found.key_rows),
        _taken(out, found.query_rows),
        _taken(lse, found.query_rows).float().t().contiguous(),
        found,
        _window_left(layout),
        scale,
    )
    rows = (found.query_rows, q.shape[0]), (found.key_rows, k.shape[0]), (found.key_rows, v.shape[0])
    dq, dk, dv = (_put(part, *place, 0.0) for part, place in zip((dq, dk, dv), rows, strict=True))
    return dq, dk, dv


def _torch_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, found: Sequences, left: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = _forward(
        q, k, v, *found.lengths, 0.0, left < 0, False, scale=scale, window_size_left=left, window_size_right=0
    )
    return out, lse


def _torch_backward(  # noqa: PLR0917 - see KernelBackward
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    found: Sequences,
    left: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    no_dropout = (torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device))  # its state
    with _deterministic():
        dq, dk, dv = _backward(
            grad, q, k, v, out, lse, *found.lengths, 0.0, left < 0, *no_dropout,
            scale=scale, window_size_left=left, window_size_right=0,
        )  # fmt: skip
    return dq, dk, dv


@lru_cache(maxsize=64)
def sequences(
    spans: tuple[Span, ...], num_query_rows: int, num_key_rows: int, device: torch.device
) -> Sequences | None:
    """What the kernels are told of `spans`; None if no query sees anything.

    Raises AttentionBackendError for spans whose last query stands beyond the last key (parts of a ring) and for keys
    that several spans share.
    """
    seen = [cut for span in spans if (cut := _seen(span)) is not None]
    if not seen:
        return None
    by_key = sorted((span.key_start, span.num_keys) for span in seen)
    if any(start + count > after for (start, count), (after, _) in pairwise(by_key)):
        raise AttentionBackendError("the CUDA flash kernels take keys of one sequence each; pass backend='blocks'")
    query_counts, key_counts = [span.num_queries for span in seen], [span.num_keys for span in seen]
    return Sequences(
        query_rows=_rows([(span.query_start, span.num_queries) for span in seen], num_query_rows, device),
        key_rows=_rows([(span.key_start, span.num_keys) for span in seen], num_key_rows, device),
        cu_queries=_cumulative(query_counts, device),
        cu_keys=_cumulative(key_counts, device),
        # At 1 the kernel lays grouped heads out as rows, and its lse otherwise too; a bound of 2 keeps it from that.
        max_queries=max(2, *query_counts),
        max_keys=max(2, *key_counts),
    )


def _seen(span: Span) -> Span | None:
    """The span without queries that see nothing and keys that nobody sees, so that its last query meets its last key.

    A window is no matter: a query always sees at least the key at its own position.
    """
    skipped = max(0, -span.offset)
    num_queries, offset = span.num_queries - skipped, span.offset + skipped
    num_keys = min(span.num_keys, offset + num_queries)
    if num_queries <= 0 or num_keys <= 0:
        return None
    if num_keys < offset + num_queries:
        raise AttentionBackendError(
            f"the CUDA flash kernels align the last query with the last key, but {span} has queries beyond its keys; "
            "pass backend='blocks'"
        )
    return Span(span.query_start + skipped, num_queries, span.key_start, num_keys, offset)


def _rows(pieces: list[tuple[int, int]], num_rows: int, device: torch.device) -> torch.Tensor | None:
    """Numbers of the rows in `pieces` (start, count), one after the other; None if they are 0 to `num_rows` - 1."""
    rows = list(chain.from_iterable(range(start, start + count) for start, count in pieces))
    return None if rows == list(range(num_rows)) else torch.tensor(rows, device=device)


def _cumulative(counts: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32, device=device)


def _window_left(layout: Layout) -> int:
    """How many keys a row sees to the left of its own; -1 is all."""
    return -1 if layout.window is None else layout.window - 1


def _taken(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return tensor.contiguous() if rows is None else tensor.index_select(0, rows)


def _put(found: torch.Tensor, rows: torch.Tensor | None, num_rows: int, missing: float) -> torch.Tensor:
    """`found` at its rows of `num_rows`; the others are `missing`."""
    if rows is None:
        return found.contiguous()
    return found.new_full((num_rows, *found.shape[1:]), missing).index_copy_(0, rows, found)


def refuses_size(size: int) -> str | None:
    """Why the CUDA flash kernels cannot take heads of `size`, or None."""
    if size % HEAD_SIZE_MULTIPLE or size > MAX_HEAD_SIZE:
        multiples = f"multiples of {HEAD_SIZE_MULTIPLE} up to {MAX_HEAD_SIZE}"
        return f"the CUDA flash kernels take head sizes that are {multiples}, got {size}"
    return None


@contextmanager
def _deterministic() -> Iterator[None]:
    """The backward kernel adds dq up in a fixed order only while torch is told to be deterministic."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
