"""Keel's experts, registered with `transformers` as `experts_implementation="keel"`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _ClampedGate:
    """Where a family's clamped gate has its numbers: attributes of the module, or numbers that its code has."""

    limit: str
    alpha: str | float = 1.0
    offset: float = 0.0


# Families with a gate of their own: act = gate' * sigmoid(alpha * gate') * (up' + offset), gate and up clamped before.
CLAMPED_GATES: Mapping[str, _ClampedGate] = {
    "GptOssExperts": _ClampedGate("limit", "alpha", 1.0),
    "OpenAIPrivacyFilterExperts": _ClampedGate("limit", "alpha", 1.0),
    "MiniMaxM3VLExperts": _ClampedGate("swiglu_limit", "swiglu_alpha", 1.0),
    "DeepseekV4Experts": _ClampedGate("limit"),
    "HYV4Experts": _ClampedGate("swiglu_limit"),
    "Glm5NextTextExperts": _ClampedGate("swiglu_limit"),
}


def experts_layout(module: nn.Module) -> ExpertsLayout:
    """The layout of a `transformers` experts module.

    Raises NotImplementedError for a gate that is neither silu(gate) * up nor one of `CLAMPED_GATES`, and for experts
    that are spread over processes.
    """
    from transformers.integrations import moe

    stored: Any = module
    kind = type(module)
    if getattr(stored, "_is_expert_parallel", False):
        raise NotImplementedError(
            f"experts: {kind.__name__} holds a share of the experts (expert parallelism), which experts = 'keel' does "
            "not; set experts = 'grouped_mm'"
        )
    transposed = bool(stored.is_transposed)
    interleaved = not getattr(stored, "is_concatenated", True)
    act = getattr(stored, "act_fn", None)
    silu = act is nn.functional.silu or type(act).__name__ in ("SiLU", "SiLUActivation")
    clamped = CLAMPED_GATES.get(kind.__name__)
    if clamped is not None and (silu or not hasattr(stored, "act_fn")):
        return ExpertsLayout(
            transposed=transposed,
            interleaved=interleaved,
            alpha=float(getattr(stored, clamped.alpha) if isinstance(clamped.alpha, str) else clamped.alpha),
            offset=clamped.offset,
            limit=float(getattr(stored, clamped.limit)),
        )
    plain_gate = getattr(kind, "_apply_gate", None) is moe._default_apply_gate and getattr(stored, "has_gate", True)
    if plain_gate and not interleaved and silu:
        return ExpertsLayout(transposed=transposed, interleaved=False)
    raise NotImplementedError(
        f"experts: {kind.__name__} gates in a way that experts = 'keel' does not know (it knows silu(gate) * up and "
        f"the clamped gates of {', '.join(CLAMPED_GATES)}); set experts = 'grouped_mm'"
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
