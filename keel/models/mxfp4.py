"""Checkpoints whose experts are stored as MXFP4, as GPT-OSS is published: read as bfloat16, exactly, and written so.

In MXFP4 (OCP Microscaling Formats specification 1.0, 2023) 32 values share a scale. A value is one of 16 (e2m1: 0 to 6
with a sign, two to a byte), its scale a power of two (e8m0). bfloat16 holds every such product exactly, so nothing is
lost in reading; training changes the bfloat16 weights, and what is exported is bfloat16.

`transformers` does the arithmetic; it needs to be told, because what it would choose otherwise depends on which kernels
are installed and cannot be trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_READ = "_keel_read_from_mxfp4"


def stored_as(config: Any) -> str:
    """How the weights of a `transformers` configuration are quantized in its files: "mxfp4", another name, or ""."""
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return ""
    method = found.get("quant_method", "") if isinstance(found, dict) else getattr(found, "quant_method", "")
    return str(getattr(method, "value", method))


def loading_options(config: Any) -> dict[str, Any]:
    """What `from_pretrained` must be told to give weights that can be trained.

    Raises ValueError for weights quantized in another way.
    """
    method = stored_as(config)
    if not method:
        return {}
    if method != "mxfp4":
        raise ValueError(
            f"model: its weights are stored quantized ({method}), which Keel cannot train; use the model's bfloat16 "
            "weights (of quantized ones MXFP4 is read)"
        )
    from transformers import Mxfp4Config

    return {"quantization_config": Mxfp4Config(dequantize=True)}


def finish_reading(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give every parameter of a `model` loaded with `loading_options` the type `dtype`, and note how it was stored.

    The experts come as bfloat16 whatever was asked for. Buffers keep their type: rotary frequencies are float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    setattr(model, _READ, True)


def saving_options(model: PreTrainedModel) -> dict[str, Any]:
    """What `save_pretrained` must be told, so that a model read from MXFP4 is written whole, in its own type.

    Without it `transformers` undoes the reading's renaming without quantizing again, and the experts are left out.
    """
    return {"save_original_format": False} if getattr(model, _READ, False) else {}
