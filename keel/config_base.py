"""What every section of the config is made of; sections in modules of their own import it from here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """A part of the config: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class Plugin(BaseModel):
    """A plug-in and its options: `{ id = "ppo_clip", clip_high = 0.28 }`. `id` is a built-in's short name or
    `package.module:name`; the other keys are the target's keyword-only arguments, checked when the config is loaded.
    Without options the name alone will do: `loss = "ppo_clip"`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    id: str = Field(description="built-in short name, or package.module:name")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"id": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _as_tuple(value: Any) -> Any:
    """One plug-in stands for a list of one."""
    if isinstance(value, (str, Mapping, Plugin)):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


Plugins = Annotated[tuple[Plugin, ...], BeforeValidator(_as_tuple)]
"""Plug-ins one after the other: `"a"`, `{ id = "a", x = 1 }` or `["a", { id = "b" }]`."""
