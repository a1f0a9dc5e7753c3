"""A third opinion: the model in plain `transformers`, eager attention, none of Keel's operators or patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


class Reference:
    """The model of a directory as `transformers` alone computes it; float32 unless told otherwise."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    def load(cls, path: str | Path, *, dtype: torch.dtype = torch.float32) -> Reference:
        """Read a Hugging Face directory. Raises what `transformers` raises for a path that is no model."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
        return cls(model.eval())
