"""Which parameter of a vLLM model takes which of the learner's tensors, found by walking the vLLM model.

The learner's names are those of `named_parameters()` of the `transformers` module; vLLM fuses some (query, key and
value; gate and up) and calls others differently. The walk starts from vLLM's side, so every one of its parameters is
either taken care of or named in an error: none can be forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

Kind = Literal["linear", "embedding", "experts", "sinks", "plain"]
Shard = str | int | None

NAMES_SHOWN = 8
# vLLM's part of a path -> the learner's, by model type.
_RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "gpt_oss": ((".attn.", ".self_attn."), ("model.embedding.", "model.embed_tokens.")),
}
# How the learner lays experts out: [E, in, out] with gate and up alternating, or [E, out, in] with gate before up.
EXPERT_LAYOUTS: Mapping[str, str] = {"gpt_oss": "interleaved", "qwen3_moe": "stacked"}


class WeightsRefusedError(ValueError):
    """Weights that do not fit the model, or a model that cannot be written to; nothing has been changed."""


@dataclass(frozen=True)
class Target:
    """Where one of the learner's tensors goes: a parameter of a module, and the part of it. `shape` is the whole's."""

    module: str
    kind: Kind
    parameter: str
    shard: Shard
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """`targets` by the learner's names; every parameter of the vLLM model is covered by them.

    `tied` has, by the path of an embedding, the modules that hold the very same weight under another path (a head).
    """

    targets: Mapping[str, Target]
    dtype: torch.dtype
    tied: Mapping[str, tuple[str, ...]]

    def modules(self, names: set[str]) -> dict[str, dict[str, Target]]:
        """The targets of each module that one of `names` goes to, all of them: a fused module is written whole."""
        touched = {self.targets[name].module for name in names}
        result: dict[str, dict[str, Target]] = {}
        for name, target in self.targets.items():
            if target.module in touched:
                result.setdefault(target.module, {})[name] = target
        return result

    def check(self, found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], wanted: set[str] | None = None) -> None:
        """Raise WeightsRefusedError unless `found` (type and shape by name) is `wanted` (all there is), and fits."""
        wanted = set(self.targets) if wanted is None else wanted
        problems = []
        if missing := sorted(wanted - set(found)):
            problems.append(f"missing: {listed(missing)}")
        if unexpected := sorted(set(found) - set(self.targets)):
            problems.append(f"unknown to vLLM's model: {listed(unexpected)}")
        for name in sorted(set(found) & set(self.targets)):
            dtype, shape = found[name]
            target = self.targets[name]
            if tuple(shape) != target.shape or dtype != self.dtype:
                problems.append(f"{name} is {dtype} {list(shape)}, vLLM's is {self.dtype} {list(target.shape)}")
        if problems:
            raise WeightsRefusedError(
                f"{listed(problems, '; ')}. Learner and server must hold the same model and dtype"
            )


def make_plan(model: nn.Module, vllm_config: Any) -> Plan:
    """The plan of `model`. Raises WeightsRefusedError for a server that Keel cannot write weights to, saying why."""
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    config = model_config.hf_text_config
    refuse_unwritable(vllm_config)
    renamed = _RENAMED.get(config.model_type, ())
    targets: dict[str, Target] = {}
    covered: set[str] = set()
    tied: dict[str, tuple[str, ...]] = {}
    owners: dict[int, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding):
            owner = owners.setdefault(id(module.weight), path)
            if owner != path:
                tied[owner] = (*tied.get(owner, ()), path)
                covered.add(f"{path}.weight")
                continue
        found = _targets_of(path, module, config, parallel.tensor_parallel_size)
        for name, target in found.items():
            for theirs, ours in renamed:
                name = name.replace(theirs, ours)
            targets[name] = target
        covered |= {f"{target.module}.{target.parameter}" for target in found.values()}
    uncovered = sorted({name for name, _ in model.named_parameters()} - covered)
    if uncovered:
        raise WeightsRefusedError(
            f"{config.model_type}: Keel does not know how to write {listed(uncovered)} of vLLM's model; "
            "sample with engine.id = 'embedded'"
        )
    return Plan(targets, model_config.dtype, tied)


def refuse_unwritable(vllm_config: Any) -> None:
    """Raise WeightsRefusedError for quantized weights and for layouts that Keel does not shard for."""
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model_config.quantization is not None:
        raise WeightsRefusedError(
            f"the server holds weights quantized as {model_config.quantization!r}: the policy that acts would not be "
            "the one that learns. Serve the unquantized weights (for GPT-OSS: dequantize the checkpoint first)"
        )
    for wrong, what in (
        (parallel.pipeline_parallel_size > 1, "pipeline parallel"),
        (parallel.enable_expert_parallel, "expert parallel"),
        (parallel.enable_eplb, "expert load balancing"),
        (vllm_config.lora_config is not None, "vLLM's own LoRA"),
    ):
        if wrong:
            raise WeightsRefusedError(f"the server runs {what}, for which Keel cannot place weights; start it without")


def _targets_of(path: str, module: nn.Module, config: Any, tp_size: int) -> dict[str, Target]:
    """The learner's names (in vLLM's words still) for the parameters that `module` itself holds."""
    if isinstance(module, LinearBase):
        if not isinstance(module.quant_method, UnquantizedLinearMethod):
            raise WeightsRefusedError(f"{path} is quantized ({type(module.quant_method).__name__}); serve it plain")
        return _linear(path, module)
    if isinstance(module, VocabParallelEmbedding):
        found: dict[str, tuple[int, ...]] = {"weight": (module.org_vocab_size, module.embedding_dim)}
        if getattr(module, "bias", None) is not None:
            found["bias"] = (module.org_vocab_size,)
        return {f"{path}.{name}": Target(path, "embedding", name, None, shape) for name, shape in found.items()}
    if isinstance(module, RoutedExperts):
        return _experts(path, module, config)
    result: dict[str, Target] = {}
    for name, parameter in module.named_parameters(recurse=False):
        shape = tuple(parameter.shape)
        if name == "sinks":
            result[f"{path}.sinks"] = Target(path, "sinks", name, None, (shape[0] * tp_size,))
        else:
            result[f"{path}.{name}"] = Target(path, "plain", name, None, shape)
    return result


def _linear(path: str, module: Any) -> dict[str, Target]:
    """A linear layer, or the layers that a fused one is made of."""
    parent, _, leaf = path.rpartition(".")
    inputs = module.input_size
    parts: list[tuple[str, Shard, int]]
    if isinstance(module, QKVParallelLinear):
        keys = module.total_num_kv_heads * module.head_size
        values = module.total_num_kv_heads * module.v_head_size
        queries = module.total_num_heads * module.head_size
        parts = [(f"{parent}.{n}_proj", n, size) for n, size in (("q", queries), ("k", keys), ("v", values))]
    elif isinstance(module, MergedColumnParallelLinear) and leaf == "gate_up_proj":
        gate, up = module.output_sizes
        parts = [(f"{parent}.gate_proj", 0, gate), (f"{parent}.up_proj", 1, up)]
    elif isinstance(module, MergedColumnParallelLinear):
        raise WeightsRefusedError(f"{path}: a fused layer that Keel does not know how to fill")
    else:
        parts = [(path, None, module.output_size)]
    result = {f"{name}.weight": Target(path, "linear", "weight", shard, (size, inputs)) for name, shard, size in parts}
    if module.bias is not None:
        result |= {f"{name}.bias": Target(path, "linear", "bias", shard, (size,)) for name, shard, size in parts}
    return result


def _experts(path: str, module: Any, config: Any) -> dict[str, Target]:
    """The fused experts of a layer, as `transformers` 5 holds them."""
    layout = EXPERT_LAYOUTS.get(config.model_type)
    if layout is None:
        raise WeightsRefusedError(f"{path}: Keel does not know how {config.model_type} lays its experts out")
    number, hidden = module.global_num_experts, config.hidden_size
    inner = config.intermediate_size if layout == "interleaved" else config.moe_intermediate_size
    parent = path.removesuffix(".routed_experts")
    gate_up: tuple[int, ...] = (number, 2 * inner, hidden)
    down: tuple[int, ...] = (number, hidden, inner)
    if layout == "interleaved":
        gate_up, down = (number, hidden, 2 * inner), (number, inner, hidden)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "gate_up_proj": ("w13_weight", gate_up),
        "down_proj": ("w2_weight", down),
    }
    if hasattr(module, "w13_bias"):
        shapes["gate_up_proj_bias"] = ("w13_bias", (number, 2 * inner))
        shapes["down_proj_bias"] = ("w2_bias", (number, hidden))
    return {f"{parent}.{n}": Target(path, "experts", parameter, n, shape) for n, (parameter, shape) in shapes.items()}


def listed(names: list[str], separator: str = ", ") -> str:
    """Some of `names`, and how many more."""
    more = f"{separator}and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return separator.join(names[:NAMES_SHOWN]) + more
