"""Faults planted in the real learner: the same modules, parameters and optimizer, seen and fed as a faulty stack would.

No parameter is written. What is planted stands before the modules' parameters and around `PolicyModel.forward`, and
goes with the context: the policy is then what it was, to the bit. docs/faults.md has the table.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keel.batch import MicroBatch
from keel.distortion import Distortion, DistortionError, random_distortions
from keel.learner.distorted_batch import ShownBatch, distorted_outputs, show
from keel.models.distorted.configuration import changed_configuration
from keel.models.distorted.modules import Change, flipped, routers_of, seen_as
from keel.models.distorted.tokens import load_splits
from keel.models.distorted.weights import WeightChanges, check_group, in_group, mixed_with_old
from keel.models.policy import PolicyModel, TokenOutputs

__all__ = ["Distortion", "PlantedFaults", "distort_learner", "random_distortions"]

STALE = ("stale_version", "stale_tensor_group")


class PlantedFaults:
    """What is planted in a policy. `new_version` tells it that the weights have changed (stale faults count these)."""

    def __init__(self, policy: PolicyModel, distortions: Sequence[Distortion]) -> None:
        self.policy = policy
        self.distortions = tuple(each for each in distortions if each.acts)
        self._late = sum(int(each.strength) for each in self.distortions if each.cause == "stale_version")
        self._groups = [each for each in self.distortions if each.cause == "stale_tensor_group"]
        self._parameters = dict(policy.model.named_parameters())
        for each in self._groups:
            check_group(each, list(self._parameters))
        self._first = self._copy(lambda name: any(in_group(each, name) for each in self._groups))
        self._history = [self._copy(lambda _: bool(self._late))]

    def new_version(self) -> None:
        """The weights have been stepped: those before are one version older now."""
        if self._late:
            self._history = [*self._history[-self._late :], self._copy(lambda _: True)]

    def _copy(self, wanted: Any) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self._parameters.items() if wanted(name)}

    def stale(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        """`parameter` as old as it is planted to be; the gradient still reaches it."""
        old = self._history[0].get(name) if len(self._history) > 1 else None
        found = parameter.detach() if old is None else old
        for each in self._groups:
            if in_group(each, name):
                found = mixed_with_old(found, self._first[name], each.strength)
        return found + (parameter - parameter.detach())


@contextmanager
def distort_learner(policy: PolicyModel, distortions: Sequence[Distortion]) -> Iterator[PlantedFaults]:
    """In this context `policy` has `distortions` planted in it; afterwards it is as it was, to the bit.

    An engine that shares the policy's modules would have the same faults of weights: give it its own. Raises
    DistortionError for a fault that this model has no place for, and for a sharded policy.
    """
    planted = PlantedFaults(policy, distortions)
    if any(type(parameter).__name__ == "DTensor" for parameter in policy.parameters()):
        raise DistortionError("distort_learner: the policy is sharded over ranks; plant faults with learner.ranks = 1")
    with ExitStack() as stack:
        _plant_weights(policy, planted, stack)
        _plant_configuration(policy, planted.distortions, stack)
        for each in planted.distortions:
            if each.cause == "router_flips" and each.group == "module":
                routers = routers_of(policy.routers, each)
                if not routers:
                    raise DistortionError(f"{each}: this model has no such router")
                for router in routers:
                    stack.enter_context(flipped(router, each))
        stack.enter_context(_forward_around(policy, planted.distortions))
        yield planted


def _plant_weights(policy: PolicyModel, planted: PlantedFaults, stack: ExitStack) -> None:
    """Every parameter that a fault reaches reads otherwise from now on."""
    changes = WeightChanges(planted.distortions, policy.model.config)
    stale = any(each.cause == "stale_version" for each in planted.distortions)
    groups = [each for each in planted.distortions if each.cause == "stale_tensor_group"]
    names = [name for name, _ in policy.model.named_parameters()]
    changes.check(names)
    touched = [n for n in names if stale or changes.touches(n) or any(in_group(each, n) for each in groups)]
    of_module: dict[str, dict[str, Change]] = {}
    for name in touched:
        owner, _, own = name.rpartition(".")
        of_module.setdefault(owner, {})[own] = partial(_read, name, changes, planted if stale or groups else None)
    for owner, readers in of_module.items():
        stack.enter_context(seen_as(policy.model.get_submodule(owner), readers))


def _read(name: str, changes: WeightChanges, planted: PlantedFaults | None, parameter: torch.Tensor) -> torch.Tensor:
    return changes.apply(name, parameter if planted is None else planted.stale(name, parameter))


def _plant_configuration(policy: PolicyModel, distortions: Sequence[Distortion], stack: ExitStack) -> None:
    """Windows and rotary positions, in the modules that were built from the configuration."""
    config = policy.model.config
    fields = changed_configuration(config, distortions)
    if not fields:
        return
    other = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(other, name, value)
    if "rope_parameters" in fields:
        _plant_rotary(policy.model, other, stack)
    if "sliding_window" in fields or "layer_types" in fields:
        _plant_windows(policy.model, other, fields, stack)


def _plant_rotary(model: nn.Module, other: Any, stack: ExitStack) -> None:
    rotaries = [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    if not rotaries:
        raise DistortionError("wrong_rope_scaling: the rotary module of this model was not found")
    for module in rotaries:
        found: Any = module
        built = type(found)(other)
        for name in ("inv_freq", "original_inv_freq"):
            if name in found._buffers:
                stack.callback(found._buffers.__setitem__, name, found._buffers[name])
                found._buffers[name] = built._buffers[name].to(found._buffers[name].device)
        stack.callback(setattr, found, "attention_scaling", found.attention_scaling)
        found.attention_scaling = built.attention_scaling


def _plant_windows(model: nn.Module, other: Any, fields: Mapping[str, Any], stack: ExitStack) -> None:
    for module in model.modules():
        found: Any = module
        layer = getattr(found, "layer_idx", None)
        if getattr(found, "sliding_window", None) is None or layer is None:
            continue
        kinds = fields.get("layer_types")
        off = kinds is not None and kinds[layer] != "sliding_attention"
        stack.callback(setattr, found, "sliding_window", found.sliding_window)
        found.sliding_window = None if off else int(other.sliding_window)


@contextmanager
def _forward_around(policy: PolicyModel, distortions: Sequence[Distortion]) -> Iterator[None]:
    """In this context the policy's forward is shown another micro-batch, and answers in the rows of its own."""
    path = Path(str(getattr(policy.model.config, "_name_or_path", "")))  # where it was loaded from
    wanted = any(each.cause == "retokenized_turns" for each in distortions)
    splits = load_splits(path) if wanted else {}
    config = policy.model.config
    fields = changed_configuration(config, distortions)
    pad_token_id = int(getattr(policy.model.config, "pad_token_id", None) or 0)
    plain = policy.forward

    def forward(micro_batch: MicroBatch, **options: Any) -> TokenOutputs:
        seen: ShownBatch = show(micro_batch, distortions, splits=splits, pad_token_id=pad_token_id)
        with seen.replaying(), _configured(config, fields):
            outputs = seen.told(plain(seen.micro_batch, **options))
        return replace(outputs, logprobs=distorted_outputs(outputs.logprobs, micro_batch, distortions))

    policy.__dict__["forward"] = forward
    try:
        yield
    finally:
        del policy.__dict__["forward"]


@contextmanager
def _configured(config: Any, fields: Mapping[str, Any]) -> Iterator[None]:
    """In this context masks are made from `fields`. Not longer, because `config` is saved with the weights."""
    own = {name: getattr(config, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(config, name, value)
