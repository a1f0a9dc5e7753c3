"""Faster declared modules in the place of `transformers`' own: same parameters, same names, same values to rounding.

A module is fitted by giving it a subclass of its own class, so checkpoints, `isinstance` and everything it inherits
stay what they were, and whatever the fast path does not cover runs the original forward.

    RMSNorm           in float32, one autograd step instead of eight
    GptOssAttention   packed rows and engine steps: q, k and v in one product, the rotation a complex product

The rotation turns the pair (i, i + D/2) of a head. Laid side by side the pair is a complex number, and turning it is
one multiplication instead of six strided ones; the rows of the q and k weights are reordered to make it so, which
costs a copy of two weights and leaves every q . k as it was, because q and k are reordered alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from keel.models.adapted import linear_factors, plain_linear
from keel.ops.low_rank import LowRank, low_rank
from keel.ops.matmul import linear
from keel.ops.numerics import is_exact
from keel.ops.rms_norm import rms_norm

_NORMS = ("GptOssRMSNorm", "Qwen3RMSNorm", "Qwen3MoeRMSNorm")
_fitted: dict[type[nn.Module], type[nn.Module]] = {}


def fit_modules(model: nn.Module) -> None:
    """Fit every module of `model` that has a faster form; doing it again changes nothing.

    Attention is fitted only where `attn_implementation` is "keel".
    """
    keel_attention = getattr(model.config, "_attn_implementation", None) == "keel"
    for module in model.modules():
        kind = type(module)
        if kind in _fitted.values():
            continue
        if kind.__name__ in _NORMS:
            module.__class__ = _subclass(kind, _FittedNorm)
        elif kind.__name__ == "GptOssAttention" and keel_attention:
            module.__class__ = _subclass(kind, _FittedAttention)


def _subclass(kind: type[nn.Module], mixin: type) -> type[nn.Module]:
    """`kind` with `mixin` before it, made once, under its own name so that repr and checks by name still hold."""
    if kind not in _fitted:
        _fitted[kind] = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})
    return _fitted[kind]


class _FittedNorm:
    """In float32 the formula is the same for every family; other types keep the family's own order of casts."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype == torch.float32 and self.weight.dtype == torch.float32:
            return rms_norm(hidden_states, self.weight, self.variance_epsilon)
        normed: torch.Tensor = super().forward(hidden_states)  # type: ignore[misc, unused-ignore]
        return normed


class _FittedAttention:
    """One packed row `[1, T, Hd]` of whole sequences, or an engine's step; all else is the original's business.

    An engine's cache so holds keys with their pairs side by side; `keel.models.lean` leaves them alike.
    """

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        packed = kwargs.get("cu_seq_lens_q") is not None or kwargs.get("keel_cache") is not None
        plain = all(plain_linear(p) for p in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        if not (packed and plain) or is_exact() or past_key_values is not None or hidden_states.shape[0] != 1:
            out: tuple[torch.Tensor, None] = super().forward(  # type: ignore[misc]
                hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
            )
            return out
        from keel.models.attention import keel_attention_forward

        query, key, value = _project_and_turn(self, hidden_states[0], position_embeddings)
        attended, _ = keel_attention_forward(
            self,
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            s_aux=self.sinks,
            **kwargs,
        )
        attended, out_proj, factors = attended[0].flatten(1), plain_linear(self.o_proj), linear_factors(self.o_proj)
        assert out_proj is not None
        projected = linear(attended, out_proj.weight, out_proj.bias)
        return (projected if factors is None else projected + low_rank(attended, factors))[None], None


def _project_and_turn(
    attention: Any, hidden: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`hidden [T, Hd]` -> q [T, H, D], k and v [T, K, D]; q and k turned, their pairs side by side."""
    wrapped = (attention.q_proj, attention.k_proj, attention.v_proj)
    projections = [linear_layer for module in wrapped if (linear_layer := plain_linear(module)) is not None]
    width = attention.head_dim
    turned_rows = sum(projection.weight.shape[0] for projection in projections[:2])
    num_heads, num_kv_heads = (projection.weight.shape[0] // width for projection in projections[:2])
    weight = torch.cat([_paired(p.weight, width) for p in projections[:2]] + [projections[2].weight])
    bias = None
    if projections[0].bias is not None:
        bias = torch.cat([_paired(p.bias, width) for p in projections[:2]] + [projections[2].bias])
    projected = linear(hidden, weight, bias)
    factors = [linear_factors(module) for module in wrapped]
    if any(factors):
        projected = projected + _additions(hidden, projections, factors, width)
    both, value = projected.split([turned_rows, num_kv_heads * width], dim=-1)
    turned = _turn(both.unflatten(-1, (num_heads + num_kv_heads, width // 2, 2)), position_embeddings)
    query, key = turned.split([num_heads, num_kv_heads], dim=1)
    return query, key, value.unflatten(-1, (num_kv_heads, width))


def _additions(
    hidden: torch.Tensor, projections: Sequence[nn.Linear], factors: Sequence[LowRank | None], width: int
) -> torch.Tensor:
    """What the adapters of q, k and v add to their product, `[T, (H + 2 K) * D]`, in its order."""
    parts = []
    for index, (projection, own) in enumerate(zip(projections, factors, strict=True)):
        if own is None:
            parts.append(hidden.new_zeros(hidden.shape[0], projection.weight.shape[0]))
            continue
        turned = own if index == 2 else replace(own, up=_paired(own.up.t(), width).t())
        parts.append(low_rank(hidden, turned))
    return torch.cat(parts, dim=-1)


def _paired(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of a projection with (i, i + D/2) of each head side by side."""
    heads: torch.Tensor = rows.unflatten(0, (-1, 2, width // 2))
    return heads.transpose(1, 2).reshape(rows.shape)


def _turn(pairs: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """`pairs [T, heads, D/2, 2]` as complex numbers times cos + i sin `[1, T, D/2]` -> `[T, heads, D]`."""
    wide = torch.promote_types(pairs.dtype, torch.float32)
    angle = torch.complex(*(part[0].to(wide) for part in position_embeddings))
    turned: torch.Tensor = torch.view_as_complex(pairs.to(wide)) * angle[:, None]
    return torch.view_as_real(turned).flatten(-2).to(pairs.dtype)
