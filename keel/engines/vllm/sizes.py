"""Sizes that vLLM's CPU build cannot run, found before a server is started for them."""

from __future__ import annotations

from typing import Any

from keel.config import ModelConfig
from keel.engines.base import EngineError
from keel.engines.vllm.identity import read_config

EXPERT_MULTIPLE = 32
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def check_cpu_sizes(model: ModelConfig) -> None:
    """Raises EngineError, naming each field and values that work, if vLLM's CPU kernels cannot run a model of these
    sizes: its matrices of experts go by blocks, its attention knows some sizes of heads."""
    wrong = wrong_sizes(read_config(model))
    if not wrong:
        return
    told = "; ".join(f"{name} is {value}, and {rule}" for name, (value, rule, _) in wrong.items())
    values = ", ".join(f"{name} = {fit}" for name, (_, _, fit) in wrong.items())
    where = f"model.tiny.options = {{ {values} }}" if model.tiny.preset else f"a model with {values}"
    raise EngineError(
        f"vllm: vLLM's CPU build cannot run the model at {model.path}: {told}. Set {where}, sample with "
        "engine.id = 'embedded', or run vLLM on a GPU"
    )


def wrong_sizes(config: Any) -> dict[str, tuple[int, str, int]]:
    """By field of a model's configuration: its value, what it must be, and the nearest value that is."""
    wrong: dict[str, tuple[int, str, int]] = {}
    has_experts = bool(getattr(config, "num_local_experts", 0) or getattr(config, "num_experts", 0))
    # vLLM pads the experts' inner size itself, but not where gate and up alternate, as they do in GPT-OSS.
    names = ("hidden_size", *(("intermediate_size",) if config.model_type == "gpt_oss" else ()))
    for name in names if has_experts else ():
        value = int(getattr(config, name))
        if value % EXPERT_MULTIPLE:
            fit = max(EXPERT_MULTIPLE, round(value / EXPERT_MULTIPLE) * EXPERT_MULTIPLE)
            wrong[name] = (value, f"its experts take multiples of {EXPERT_MULTIPLE}", fit)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head not in HEAD_SIZES:
        fit = min(HEAD_SIZES, key=lambda size: abs(size - head))
        wrong["head_dim"] = (head, f"its attention takes {', '.join(map(str, HEAD_SIZES))}", fit)
    return wrong
