"""Keel's experts, registered with `transformers` as `experts_implementation="keel"`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from keel.ops.experts import ExpertsLayout, ExpertsWeights, experts_forward
from keel.ops.experts_exact import experts_exact
from keel.ops.experts_tiles import experts_row_invariant
from keel.ops.low_rank import LowRank
from keel.ops.numerics import is_exact

IMPLEMENTATION = "keel"

_row_invariant: ContextVar[bool] = ContextVar("keel_row_invariant_experts", default=False)


@contextmanager
def row_invariant_experts() -> Iterator[None]:
    """In this context (and in no other thread) experts give a token the same bits whatever stands beside it.

    For sampling: there is no gradient inside.
    """
    token = _row_invariant.set(True)
    try:
        yield
    finally:
        _row_invariant.reset(token)


def register() -> None:
    """Make `experts_implementation="keel"` known to `transformers`; calling it again changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, keel_experts_forward)


def check(model: nn.Module) -> None:
    """Raise NotImplementedError, before any work is done, if `model` has experts that 'keel' does not know."""
    for module in model.modules():
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
            experts_layout(module)


def experts_layout(module: nn.Module) -> ExpertsLayout:
    """The layout of a `transformers` experts module.

    Raises NotImplementedError for a gate that is neither GPT-OSS's clamped SwiGLU nor silu(gate) * up.
    """
    from transformers.integrations import moe

    stored: Any = module
    transposed = bool(stored.is_transposed)
    interleaved = not getattr(stored, "is_concatenated", True)
    kind = type(module)
    if kind.__name__ == "GptOssExperts":
        return ExpertsLayout(
            transposed=transposed, interleaved=True, alpha=float(stored.alpha), offset=1.0, limit=float(stored.limit)
        )
    plain_gate = getattr(kind, "_apply_gate", None) is moe._default_apply_gate and getattr(stored, "has_gate", True)
    if plain_gate and not interleaved and type(getattr(stored, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation"):
        return ExpertsLayout(transposed=transposed, interleaved=False)
    raise NotImplementedError(
        f"experts: {kind.__name__} gates in a way that experts = 'keel' does not know "
        "(it knows GPT-OSS's clamped SwiGLU and silu(gate) * up); set experts = 'grouped_mm'"
    )


def keel_experts_forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    adapters: Mapping[str, LowRank | None] | None = None,
) -> torch.Tensor:
    """What `transformers` calls in the place of an experts module's forward.

    `hidden_states [T, Hd]`, `top_k_index [T, k]`, `top_k_weights [T, k]` -> `[T, Hd]`. `adapters` are those of its
    parameters, by their names.
    """
    layout = getattr(module, "_keel_layout", None)
    if layout is None:
        layout = experts_layout(module)
        module._keel_layout = layout  # type: ignore[assignment]
    stored: Any = module
    bias = bool(getattr(stored, "has_bias", False))
    adapters = adapters or {}
    experts = ExpertsWeights(
        stored.gate_up_proj,
        stored.gate_up_proj_bias if bias else None,
        stored.down_proj,
        stored.down_proj_bias if bias else None,
        adapters.get("gate_up_proj"),
        adapters.get("down_proj"),
    )
    run = experts_exact if is_exact() else experts_row_invariant if _row_invariant.get() else experts_forward
    return run(hidden_states, top_k_index, top_k_weights.to(hidden_states.dtype), experts, layout)
