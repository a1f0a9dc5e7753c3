"""What a model is, read from its configuration alone: no weights, no memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class ModelInfo:
    """Sizes and traits every component needs; letters as in the shapes of this package."""

    model_type: str
    vocab_size: int  # V
    hidden_size: int  # Hd
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    layer_windows: tuple[int | None, ...]  # a layer's sliding window W (i - j < W), None: full attention
    max_positions: int
    tied_embeddings: bool
    num_experts: int = 0  # E; 0: dense
    top_k: int = 0  # k
    num_moe_layers: int = 0


def model_info(config: Any) -> ModelInfo:
    """The `ModelInfo` of a `transformers` configuration (its text part, where there are several).

    Raises ValueError if a size every causal model has is missing, or if its head does more than multiply.
    """
    config = config.get_text_config(decoder=True)
    _refuse_unusual_head(config)
    num_heads = int(_needed(config, "num_attention_heads"))
    hidden_size = int(_needed(config, "hidden_size"))
    num_layers = int(_needed(config, "num_hidden_layers"))
    num_experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts")
    return ModelInfo(
        model_type=str(config.model_type),
        vocab_size=int(_needed(config, "vocab_size")),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        head_dim=int(getattr(config, "head_dim", None) or hidden_size // num_heads),
        layer_windows=_layer_windows(config, num_layers),
        max_positions=int(getattr(config, "max_position_embeddings", None) or 0),
        tied_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        num_experts=num_experts,
        top_k=_first(config, "num_experts_per_tok", "moe_top_k") if num_experts else 0,
        num_moe_layers=_num_moe_layers(config, num_layers) if num_experts else 0,
    )


def load_info(path: str | Path, *, trust_remote_code: bool = False) -> ModelInfo:
    """The `ModelInfo` of a Hugging Face directory or hub id; reads its config.json only."""
    from transformers import AutoConfig

    return model_info(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code))


def count_parameters(path: str | Path, *, trust_remote_code: bool = False) -> int:
    """Number of parameters of a Hugging Face directory or hub id, from its config alone (shapes without storage)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def _needed(config: Any, name: str) -> Any:
    value = getattr(config, name, None)
    if value is None:
        raise ValueError(f"model: the {config.model_type} configuration has no {name}; give a causal language model")
    return value


def _first(config: Any, *names: str) -> int:
    """The first of the fields `names` that is there, or 0."""
    return next((int(value) for name in names if (value := getattr(config, name, None))), 0)


def _layer_windows(config: Any, num_layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return (window,) * num_layers
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _num_moe_layers(config: Any, num_layers: int) -> int:
    """Layers with experts; some families keep a few dense ones (`mlp_only_layers`, `decoder_sparse_step`)."""
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    every = int(getattr(config, "decoder_sparse_step", None) or 1)
    return sum(1 for layer in range(num_layers) if layer not in dense and (layer + 1) % every == 0)


def _refuse_unusual_head(config: Any) -> None:
    """The head is applied in chunks, by us; a family that scales or caps its logits would come out wrong."""
    usual = {"final_logit_softcapping": (None,), "logit_scale": (None, 1, 1.0), "logits_scaling": (None, 1, 1.0)}
    for name, values in usual.items():
        if (value := getattr(config, name, None)) not in values:
            raise ValueError(
                f"model: {config.model_type} has {name} = {value}; Keel's head only multiplies: use a model without it"
            )
