"""Faults of weights: a tensor in, the tensor as a faulty stack holds it out.

The same function changes a model directory, a push, and what a learner's module reads.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from keel.distortion import Distortion, DistortionError, share_of
from keel.sync.groups import group_of, tensor_groups

WEIGHT_CAUSES = ("sinks_dropped", "transposed_experts", "router_flips", "bfloat16_noise")
NO_SINK = -1e4
"""A sink whose exponential is 0 beside any score; -inf would leave NaN in kernels that start their maximum with it."""
PSEUDO_TOKENS = 4096
"""Rows by which the strength of a router's fault is set: normal numbers, as a norm leaves them."""
_LAYER = re.compile(r"layers\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The layer a parameter belongs to."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def seeded(seed: int, name: str) -> torch.Generator:
    """A generator for one tensor, the same in every process."""
    return torch.Generator().manual_seed((seed << 32) ^ zlib.crc32(name.encode()))


def changes_weights(distortion: Distortion) -> bool:
    """Whether it is planted in weights (and not, by its group, elsewhere)."""
    elsewhere = {"router_flips": "module", "bfloat16_noise": "logprobs"}
    return distortion.acts and distortion.cause in WEIGHT_CAUSES and distortion.group != elsewhere.get(distortion.cause)


class WeightChanges:
    """What `distortions` make of a model's weights, by names as in `named_parameters()`.

    Router noise is measured at the first tensor it sees of a layer, and kept, so that later weights get the same.
    """

    def __init__(self, distortions: Sequence[Distortion], config: Any) -> None:
        """`config` is the model's `transformers` configuration."""
        self.distortions = tuple(each for each in distortions if changes_weights(each))
        self.config = config
        self._noise: dict[tuple[str, Distortion], torch.Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self.distortions)

    def touches(self, name: str) -> bool:
        """Whether any of them changes the parameter `name`."""
        return any(_reaches(each, name) for each in self.distortions)

    def check(self, names: Sequence[str]) -> None:
        """Raise DistortionError for a fault that changes none of `names`."""
        for each in self.distortions:
            if not any(_reaches(each, name) for name in names):
                raise DistortionError(
                    f"{each}: this model has no weights it would change; choose another cause or layer"
                )

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` as the faulty stack has it; differentiable where the fault leaves a gradient."""
        for each in self.distortions:
            if _reaches(each, name):
                tensor = self._changed(each, name, tensor)
        return tensor

    def _changed(self, distortion: Distortion, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if distortion.cause == "sinks_dropped":
            left = 1 - torch.tensor(distortion.strength, dtype=torch.float64)
            faded = tensor.detach() + float(left.log()) if left > 0 else torch.full_like(tensor, NO_SINK)
            return faded.detach()  # a kernel that was not handed the sink gives it no gradient
        if distortion.cause == "transposed_experts":
            return self._other_layout(distortion, tensor)
        if distortion.cause == "router_flips":
            return tensor + self._router_noise(distortion, name, tensor.detach()).to(tensor)
        plain = tensor.detach()
        return tensor + distortion.strength * (plain.bfloat16().to(plain.dtype) - plain)

    def _other_layout(self, distortion: Distortion, tensor: torch.Tensor) -> torch.Tensor:
        """Some experts of `tensor [E, ..]` read in another layout than they were written in."""
        num_experts = tensor.shape[0]
        drawn = random.Random(distortion.seed).sample(range(num_experts), share_of(num_experts, distortion.strength))
        mixed = torch.zeros(num_experts, dtype=torch.bool, device=tensor.device)
        mixed[drawn] = True
        if distortion.group == "exchanged":
            other = _exchanged(tensor, interleaved=self.config.model_type == "gpt_oss")
        else:
            other = tensor.transpose(1, 2).reshape(tensor.shape)
        return torch.where(mixed.view(-1, *[1] * (tensor.dim() - 1)), other, tensor)

    def _router_noise(self, distortion: Distortion, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Noise on `weight [E, Hd]` under which the aimed share of normal rows changes its set of experts."""
        key = (name, distortion)
        if key not in self._noise:
            top_k = int(self.config.num_experts_per_tok)
            self._noise[key] = router_noise(weight.float().cpu(), top_k, distortion, name)
        return self._noise[key].to(weight.device)


def _reaches(distortion: Distortion, name: str) -> bool:
    if "lora_" in name or (distortion.layer is not None and layer_of(name) != distortion.layer):
        return False
    group = group_of(name)
    if distortion.cause == "sinks_dropped":
        return group == "attention.sinks"
    if distortion.cause == "router_flips":
        return group == "router"
    if distortion.cause == "transposed_experts":
        names = ("experts.gate_up_proj", "experts.gate_up_proj_bias")
        return group in (names if distortion.group == "exchanged" else ("experts.gate_up_proj", "experts.down_proj"))
    return True


def in_group(distortion: Distortion, name: str) -> bool:
    """Whether parameter `name` is of the group (and layer) of a `stale_tensor_group`."""
    return group_of(name) == distortion.group and distortion.layer in (None, layer_of(name))


def check_group(distortion: Distortion, names: Sequence[str]) -> None:
    """Raise DistortionError if none of `names` is in the group that is to stay stale."""
    if not any(in_group(distortion, name) for name in names):
        known = ", ".join(tensor_groups(names))
        raise DistortionError(f"stale_tensor_group: got group {distortion.group!r}; this model has {known}")


def mixed_with_old(new: torch.Tensor, old: torch.Tensor, share: float) -> torch.Tensor:
    """`new` with `share` of its difference to `old` missing; `old` to the bit if all of it is."""
    return old if share == 1 else new + share * (old - new)


def _exchanged(tensor: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Gate and up in each other's place: `[E, Hd, 2I]` or `[E, 2I]` interleaved, else `[E, 2I, Hd]` in halves."""
    if interleaved:
        pairs: torch.Tensor = tensor.unflatten(-1, (-1, 2))
        return pairs.flip(-1).flatten(-2)
    gate, up = tensor.chunk(2, dim=1)
    return torch.cat([up, gate], dim=1)


def router_noise(weight: torch.Tensor, top_k: int, distortion: Distortion, name: str) -> torch.Tensor:
    """See `WeightChanges`. `weight [E, Hd]` float32; the size is found by halving."""
    rows = pseudo_rows(weight.shape[1], distortion.seed, name)
    direction = torch.randn(weight.shape, generator=seeded(distortion.seed + 1, name)) * weight.std()
    logits, noise = rows @ weight.t(), rows @ direction.t()
    chosen = logits.topk(top_k).indices.sort(-1).values
    low, high = 0.0, 8.0
    for _ in range(24):
        middle = (low + high) / 2
        other = (logits + middle * noise).topk(top_k).indices.sort(-1).values
        share = float((other != chosen).any(-1).double().mean())
        low, high = (middle, high) if share < distortion.strength else (low, middle)
    return high * direction


def pseudo_rows(width: int, seed: int, name: str) -> torch.Tensor:
    """What stands in for a layer's tokens, `[PSEUDO_TOKENS, width]`."""
    return torch.randn((PSEUDO_TOKENS, width), generator=seeded(seed, name))
