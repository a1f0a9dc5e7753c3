"""Attention with learned sinks: exact forward and backward on stock kernels, next to a dense float64 twin."""

from __future__ import annotations

from keel.ops.attention.backends import BACKENDS, REFERENCE, Backend, choose_backend, usable_backends
from keel.ops.attention.decode import attend_cache, attend_cache_part, visible_mask
from keel.ops.attention.function import layout_attention, sink_attention
from keel.ops.attention.layout import AttentionBackendError, Layout, Span, build_layout, packed_layout
from keel.ops.attention.parallel import merge_parts, part_layout, split_heads
from keel.ops.attention.reference import dense_attention
from keel.ops.attention.sinks import apply_sinks, sinks_gradient

__all__ = [
    "BACKENDS",
    "REFERENCE",
    "AttentionBackendError",
    "Backend",
    "Layout",
    "Span",
    "apply_sinks",
    "attend_cache",
    "attend_cache_part",
    "build_layout",
    "choose_backend",
    "dense_attention",
    "layout_attention",
    "merge_parts",
    "packed_layout",
    "part_layout",
    "sink_attention",
    "sinks_gradient",
    "split_heads",
    "usable_backends",
    "visible_mask",
]
