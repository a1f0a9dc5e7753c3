"""`[sync]`: how new weights travel from the learner to the engine, and how it is checked that they arrived."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from keel.config_base import Section


class SyncConfig(Section):
    transport: Literal["auto", "file", "gloo", "nccl"] = Field(
        "auto",
        description="'file': safetensors in shared memory; 'gloo', 'nccl': a broadcast; auto: a file, or what the "
        "engine takes. An engine that shares the learner's weights needs none",
    )
    host: str = Field("127.0.0.1", description="address under which the engine reaches the learner, for a broadcast")
    check_every: int = Field(
        10,
        ge=0,
        description="publishes between weight checks, besides one after the first update: both sides score fixed "
        "tokens and must agree; 0: never. Weights that are shared are not checked",
    )
    check_tokens: int = Field(512, ge=64, description="tokens that a weight check scores")
