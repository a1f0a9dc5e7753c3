"""Weights of its own for an engine that shares nobody's."""

from __future__ import annotations

import torch

from keel.config import ModelConfig
from keel.models.policy import PolicyModel


def load_policy(model: ModelConfig, device: torch.device | str, numerics: str = "fast") -> PolicyModel:
    """The policy of `model.path` on `device`, to sample from, with the learner's `numerics`."""
    return PolicyModel.load(
        model.path,
        dtype=model.dtype,
        attention=model.attention,
        experts=model.experts,
        head_chunk_tokens=model.head_chunk_tokens,
        head_dtype=model.head_dtype,
        trust_remote_code=model.trust_remote_code,
        lora=model.lora,
        router=model.router,
        revision=model.revision,
        device=device,
        numerics=numerics,
    )
