"""Options of the routers of a mixture of experts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from keel.config_base import Section


class RouterConfig(Section):
    dtype: Literal["model", "float32"] = Field(
        "model", description="type of the router's product; float32: fewer near-ties in a bfloat16 model, both sides"
    )
    frozen: bool = Field(False, description="leave the routers' weights as they are")
    aux_loss_coefficient: float = Field(
        0.0, ge=0, description="weight of the load-balancing loss (Switch); it is at its least, top_k, in balance"
    )
