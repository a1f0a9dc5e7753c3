"""Sink attention as a `transformers` attention implementation: `attn_implementation="keel"`.

Both halves are registered, the attention function and the mask function. Without the second, `transformers` passes no
mask at all and left-padded rows come out silently wrong. What cannot be honoured exactly raises.

How a layer's call is understood, first match:

    keel_cache        an engine's own key-value slots: everything is handed to its `attend`
    keel_shared       one packed row of which what sequences have in common is there once (`keel.models.shared_rows`)
    cu_seq_lens_q     one packed row of whole sequences, the learner's way in
    mask, positions   a batch, padded left or right or not, with a `transformers` cache or without, or packed by
                      positions that restart
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from keel.models.attention_mask import AttentionMaskError, keel_mask, plan_of
from keel.models.shared_rows import SharedAttention
from keel.ops.attention import AttentionBackendError, layout_attention, sink_attention
from keel.ops.attention.backends import NAMES
from keel.ops.attention.exact import exact_attention
from keel.ops.gather import gather_rows
from keel.ops.numerics import is_exact

NAME = "keel"


class KeelCache(Protocol):
    """An engine's key-value slots, passed to the model as the keyword argument `keel_cache`."""

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        sinks: torch.Tensor | None,
        window: int | None,
        scaling: float,
    ) -> torch.Tensor:
        """Store key and value [1, K, T, D], attend for query [1, H, T, D]; return out [1, T, H, D]."""
        ...


@dataclass(slots=True)
class _Chosen:
    """The backend of every model that is loaded with "keel"."""

    backend: str = "auto"


_chosen = _Chosen()


def register(backend: str | None = None) -> None:
    """Make "keel" known to `transformers`, computed by `backend` (None: as before; at first "auto").

    Raises AttentionBackendError for a name that is not known. Whether the backend can do what a model asks is told by
    `explain`, and at the latest by the model's first pass.
    """
    if backend is not None and backend not in NAMES:
        raise AttentionBackendError(f"unknown attention backend {backend!r}; known: {', '.join(map(repr, NAMES))}")
    _chosen.backend = backend or _chosen.backend
    AttentionInterface.register(NAME, keel_attention_forward)
    AttentionMaskInterface.register(NAME, keel_mask)


def chosen_backend() -> str:
    """The name that was last given to `register`, or "auto"."""
    return _chosen.backend


# It reads tensors to lay rows out, which a traced graph cannot; what is around it is compiled.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def keel_attention_forward(  # noqa: PLR0913 - transformers' signature
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    keel_cache: KeelCache | None = None,
    keel_shared: SharedAttention | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What `transformers` calls in each layer: query [B, H, T, D], key and value [B, K, T', D] -> out [B, T, H, D].

    Rows that are padding come out as zeros. Raises AttentionMaskError on anything it cannot honour: dropout, soft caps,
    position biases, attention weights as an output, ready-made masks, padding between real tokens.
    """
    _refuse(module, dropout, s_aux, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if keel_cache is not None:
        layer_idx: Any = module.layer_idx
        out = keel_cache.attend(layer_idx, query, key, value, sinks=s_aux, window=sliding_window, scaling=scale)
        return out, None
    if keel_shared is not None:
        window = _packed_window(query, key, attention_mask, sliding_window)
        return _shared_attention(module, query, key, value, s_aux, keel_shared, window, scale), None
    if cu_seq_lens_q is not None:
        window = _packed_window(query, key, attention_mask, sliding_window)
        # The same tensor is equal to itself without being read, which off the CPU would wait for it in every layer.
        if not (cu_seq_lens_k is None or cu_seq_lens_k is cu_seq_lens_q or torch.equal(cu_seq_lens_k, cu_seq_lens_q)):
            raise AttentionMaskError("keel attention is self-attention: cu_seq_lens_k must equal cu_seq_lens_q")
        if is_exact():
            q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
            return exact_attention(q, k, v, s_aux, cu_seqlens=cu_seq_lens_q, scale=scale, window=window)[None], None
        out = sink_attention(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            s_aux,
            cu_seqlens=cu_seq_lens_q,
            max_seqlen=query.shape[2] if max_length_q is None else int(max_length_q),
            scale=scale,
            window=window,
            backend=_chosen.backend,
        )
        return out.unsqueeze(0), None
    plan = plan_of(attention_mask, query, key, sliding_window)
    out = layout_attention(
        query.transpose(1, 2).flatten(0, 1),
        key.transpose(1, 2).flatten(0, 1),
        value.transpose(1, 2).flatten(0, 1),
        s_aux,
        layout=plan.layout(position_ids),
        scale=scale,
        backend=_chosen.backend,
    )
    return out.unflatten(0, (query.shape[0], -1)), None


def _shared_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    shared: SharedAttention,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """query [1, H, U, D] of the computed rows, each of which sees the keys of its ancestors -> out [1, U, H, D]."""
    layer_idx: Any = getattr(module, "layer_idx", id(module))
    shared.layers.add(layer_idx)
    out = layout_attention(
        query[0].transpose(0, 1),
        gather_rows(key[0].transpose(0, 1), shared.key_rows),
        gather_rows(value[0].transpose(0, 1), shared.key_rows),
        sinks,
        layout=shared.layout(window),
        scale=scale,
        backend=_chosen.backend,
    )
    return out.unsqueeze(0)


def _refuse(module: torch.nn.Module, dropout: float, sinks: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raise AttentionMaskError on what would change the result and is not done here."""
    if dropout > 0.0:
        raise AttentionMaskError(
            f"keel attention has no dropout, got {dropout}; set attention_dropout=0 in the model's config, or eval()"
        )
    for name in ("softcap", "position_bias", "cache", "head_mask"):
        if kwargs.get(name) is not None:
            raise AttentionMaskError(
                f"keel attention cannot honour {name}={kwargs[name]!r}; use attn_implementation='eager' for this model"
            )
    if kwargs.get("output_attentions"):
        raise AttentionMaskError("keel attention never holds attention weights: leave out output_attentions")
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise AttentionMaskError("keel attention is causal, this layer is not; use attn_implementation='eager'")
    if sinks is None and getattr(module, "sinks", None) is not None:
        raise AttentionMaskError("keel attention: the layer has sinks but did not pass them (s_aux)")


def _packed_window(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, window: int | None) -> int | None:
    """The window of a packed row. Raises AttentionMaskError if there are more rows, a cache or a padding mask."""
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise AttentionMaskError(
            f"packed sequences (cu_seq_lens_q) are one row without a cache; got {query.shape[0]} rows, "
            f"{query.shape[2]} queries, {key.shape[2]} keys"
        )
    if mask is None:
        return window
    plan = plan_of(mask, query, key, window)
    if plan.padding is not None:
        raise AttentionMaskError("cu_seq_lens_q and attention_mask both say where sequences lie: pass one of them")
    return plan.window
