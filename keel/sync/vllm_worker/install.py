"""The learner's tensors into a vLLM module: sharded as vLLM shards, in the layout that its kernels read.

On a CPU vLLM packs matrices when it loads them and throws the plain ones away, so a module is packed anew by the same
function that packed it first. On CUDA the plain matrices are there still and are written in place, because captured
graphs know their addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .plan import Plan, Target

Fetch = Callable[[str], torch.Tensor]


@torch.no_grad()
def install(model: nn.Module, plan: Plan, names: set[str], fetch: Fetch) -> int:
    """Write what `fetch` returns for `names` (and for whatever shares a fused module with them) into `model`.

    Returns how many tensors were written. What was checked before cannot fail here; what fails all the same leaves the
    model mixed, and is raised.
    """
    written = 0
    for path, targets in plan.modules(names).items():
        module = model.get_submodule(path)
        tensors = {name: fetch(name) for name in targets}
        for kind in dict.fromkeys(target.kind for target in targets.values()):
            _WRITERS[kind](module, {name: t for name, t in targets.items() if t.kind == kind}, tensors)
        if _on_cpu():
            for follower in plan.tied.get(path, ()):  # the same storage, of which it has a packed copy of its own
                head: Any = model.get_submodule(follower)
                head.quant_method.process_weights_after_loading(head)
        written += len(tensors)
    return written


def _write_plain(module: Any, targets: Mapping[str, Target], tensors: Mapping[str, torch.Tensor]) -> None:
    for name, target in targets.items():
        getattr(module, target.parameter).data.copy_(tensors[name])


def _write_sinks(module: Any, targets: Mapping[str, Target], tensors: Mapping[str, torch.Tensor]) -> None:
    """Sinks are split like heads; an attention backend may hold a converted copy of its own."""
    from vllm.distributed import get_tensor_model_parallel_rank

    ((name, _),) = targets.items()
    own = module.sinks.shape[0]
    module.sinks.data.copy_(tensors[name].narrow(0, get_tensor_model_parallel_rank() * own, own))
    held = getattr(getattr(getattr(module, "attn", None), "impl", None), "sinks", None)
    if isinstance(held, torch.Tensor) and held.data_ptr() != module.sinks.data_ptr():
        held.data.copy_(module.sinks)


def _write_embedding(module: Any, targets: Mapping[str, Target], tensors: Mapping[str, torch.Tensor]) -> None:
    """In place, by the module's own loader; on a CPU the head reads a packed copy, which is made anew."""
    for name, target in targets.items():
        module.weight_loader(getattr(module, target.parameter), tensors[name])
    if _on_cpu():
        module.quant_method.process_weights_after_loading(module)


def _write_linear(module: Any, targets: Mapping[str, Target], tensors: Mapping[str, torch.Tensor]) -> None:
    inputs = getattr(module, "input_size_per_partition", module.input_size)
    outputs = sum(module.output_partition_sizes)
    weight = _staged(module.weight, (outputs, inputs), input_dim=1, output_dim=0)
    bias = None if module.bias is None else _staged(module.bias, (outputs,), output_dim=0)
    for name, target in targets.items():
        into = weight if target.parameter == "weight" or bias is None else bias
        tensor = tensors[name].to(into.device)
        if target.shard is None:
            module.weight_loader(into, tensor)
        else:
            module.weight_loader(into, tensor, target.shard)
    if bias is not None:
        module.bias.data.copy_(bias)
    if _on_cpu():
        module.weight = weight
        module.quant_method.process_weights_after_loading(module)
    else:
        module.weight.data.copy_(weight)


def _write_experts(module: Any, targets: Mapping[str, Target], tensors: Mapping[str, torch.Tensor]) -> None:
    by_parameter = {target.parameter: (name, target) for name, target in targets.items()}
    interleaved = by_parameter["w13_weight"][1].shape[1] == by_parameter["w2_weight"][1].shape[2]
    shards = {
        parameter: _expert_shard(module, parameter, tensors[name], interleaved)
        for parameter, (name, _) in by_parameter.items()
    }
    if _on_cpu():
        _pack_experts(module, shards)
        return
    for parameter in ("w13_bias", "w2_bias"):
        if parameter in shards:
            live = getattr(module, parameter).data
            live.zero_()
            live[tuple(slice(0, size) for size in shards[parameter].shape)].copy_(shards[parameter])
    # vLLM's own way of updating: it converts to the kernel's layout and copies into the storage that is there.
    module.quant_method._setup_kernel(layer=module, w13=shards["w13_weight"], w2=shards["w2_weight"])


def _pack_experts(module: Any, shards: Mapping[str, torch.Tensor]) -> None:
    """The plain tensors put back, and packed by the kernel as it packed the first ones.

    vLLM's own update skips this because the kernel exists already, and copies plain values into packed storage. Biases
    keep their Parameter objects: the kernel holds on to those.
    """
    for parameter, shard in shards.items():
        if parameter.endswith("bias"):
            getattr(module, parameter).data = shard
        else:
            setattr(module, parameter, nn.Parameter(shard, requires_grad=False))
    module.quant_method.moe_kernel.fused_experts.process_weights_after_loading(module)


def _expert_shard(module: Any, parameter: str, whole: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """This rank's part of an expert tensor in vLLM's order, `[E, out, in]`, as wide as vLLM made the parameter.

    Ranks split the inner dimension; what a width rounded up leaves over is zero. A bias of the down projection is
    added once, by the first rank.
    """
    config = module.moe_config
    rank = config.moe_parallel_config.tp_rank
    own, width = config.intermediate_size_per_partition_unpadded, config.intermediate_size_per_partition
    device = module.w13_weight.device
    if parameter == "w2_bias":
        return (whole if rank == 0 else torch.zeros_like(whole)).to(device, copy=True)
    if interleaved and parameter.endswith("weight"):
        whole = whole.transpose(1, 2)
    if parameter == "w2_weight":
        part = _part(whole, 2, rank, own)
        return _widened(part, 2, width).to(device, copy=True).contiguous()
    if interleaved:
        part = _widened(_part(whole, 1, rank, 2 * own), 1, 2 * width)
    else:
        halves = whole.chunk(2, dim=1)
        part = torch.cat([_widened(_part(half, 1, rank, own), 1, width) for half in halves], dim=1)
    return part.to(device, copy=True).contiguous()


def _part(tensor: torch.Tensor, dim: int, rank: int, size: int) -> torch.Tensor:
    start = min(rank * size, tensor.shape[dim])
    return tensor.narrow(dim, start, min(size, tensor.shape[dim] - start))


def _widened(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    missing = size - tensor.shape[dim]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def _staged(live: torch.Tensor, shape: tuple[int, ...], **attributes: int) -> nn.Parameter:
    """An empty parameter that vLLM's loaders can write a shard into."""
    parameter = nn.Parameter(torch.empty(shape, dtype=live.dtype, device=live.device), requires_grad=False)
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


_WRITERS: Mapping[str, Callable[..., None]] = {
    "plain": _write_plain,
    "sinks": _write_sinks,
    "embedding": _write_embedding,
    "linear": _write_linear,
    "experts": _write_experts,
}
