"""What a learner is made of, to a checkpoint and back: the same bits, from any number of ranks to any other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from keel.config import AlgoConfig, OptimConfig, Stage
from keel.learner.checkpoint import WEIGHTS, CheckpointError, verify, writing
from keel.learner.optim import MOMENTS
from keel.learner.randomness import random_states, restore_random_states

if TYPE_CHECKING:
    from keel.learner.learner import Learner

VALUES = "learner.json"
TENSORS = "learner.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def export(learner: Learner, path: Path) -> None:
    """Write the policy, or its adapter, as a Hugging Face directory; every rank must call it, the first one writes."""
    exported = _named(learner) if learner.policy.adapter else _all_named(learner)
    whole = {name: learner.ranks.gather(learner.ranks.local(p.detach()), p.detach()) for name, p in exported}
    if learner.ranks.first:
        path.mkdir(parents=True, exist_ok=True)
        learner.policy.save(path, state_dict=whole if learner.policy.adapter else _with_tied(learner, whole))
        config = learner.config
        copy_tokenizer(config.path, path, trust_remote_code=config.trust_remote_code, revision=config.revision)
    learner.ranks.barrier()


def copy_tokenizer(source: str, target: Path, *, trust_remote_code: bool = False, revision: str = "") -> None:
    """Put the tokenizer of `source` (a directory or hub id) beside the weights in `target`; without one, nothing."""
    directory = Path(source)
    if directory.is_dir():
        for name in TOKENIZER_FILES:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, target / name)
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision or "main")
    tokenizer.save_pretrained(target)


def save(learner: Learner, path: Path, extra: Mapping[str, Any]) -> None:
    """Write the checkpoint `path`; every rank must call it, the first one writes."""
    tensors = _whole_tensors(learner)
    if not learner.ranks.first:
        export(learner, path)
        learner.ranks.barrier()
        return
    random_tensors, random_values = random_states(learner.device)
    tensors.update({f"random/{name}": tensor for name, tensor in random_tensors.items()})
    values = {
        "step": learner.step,
        "version": learner.version,
        "num_skipped": learner.num_skipped,
        "optimizer_steps": learner.optimizer.num_steps,
        "stage": None if learner.stage is None else _stage_to_json(learner.stage),
        "base": learner.base,
        "random": random_values,
        "extra": dict(extra),
    }
    with writing(path, learner.step) as directory:
        (directory / VALUES).write_text(json.dumps(values), encoding="utf-8")
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, directory / TENSORS)
        export(learner, directory / WEIGHTS)
    learner.ranks.barrier()


def load(learner: Learner, path: Path) -> dict[str, Any]:
    """Put the learner into the state of the checkpoint `path`; returns its `extra`."""
    verify(path)
    values = json.loads((path / VALUES).read_text(encoding="utf-8"))
    with safe_open(str(path / TENSORS), framework="pt", device="cpu") as file:
        names = set(file.keys())
        _check_shapes(learner, file, path)
        _check_base(learner, values, path)
        parameters = learner.parameters()

        def part(kind: str, name: str) -> torch.Tensor:
            like = parameters[name].detach()
            return learner.ranks.part(file.get_tensor(f"{kind}/{name}"), like).to(learner.device)

        with torch.no_grad():
            for name, master in learner.optimizer.masters.items():
                master.copy_(part("master", name))
            learner.optimizer.round()
        learner.step = int(values["step"])
        learner.version = int(values["version"])
        learner.num_skipped = int(values["num_skipped"])
        learner.resume_stage(None if values["stage"] is None else _stage_from_json(values["stage"]))
        if learner.stage is not None:
            learner.optimizer.reset(learner.stage.optim)
            if values["optimizer_steps"]:
                moments = {kind: {name: part(kind, name) for name in parameters} for kind in MOMENTS}
                learner.optimizer.restore(moments, int(values["optimizer_steps"]))
        referenced = any(name.startswith("reference/") for name in names)
        learner.reference = {name: part("reference", name) for name in parameters} if referenced else None
        random_tensors = {
            name.removeprefix("random/"): file.get_tensor(name) for name in names if name.startswith("random/")
        }
    restore_random_states(random_tensors, values["random"], learner.device)
    extra: dict[str, Any] = values["extra"]
    return extra


def _named(learner: Learner) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return iter(learner.parameters().items())


def _all_named(learner: Learner) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """What is trained and what stays as it is, such as frozen routers; tied ones once."""
    yield from _named(learner)
    own = {id(parameter) for parameter in learner.parameters().values()}
    yield from ((name, p) for name, p in learner.policy.model.named_parameters() if id(p) not in own)


def _with_tied(learner: Learner, whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`whole` under every name of the state dict: a tied tensor has two, buffers are no parameters."""
    result = dict(whole)
    owners = {id(parameter): name for name, parameter in _all_named(learner)}
    for name, parameter in learner.policy.model.named_parameters(remove_duplicate=False):
        result.setdefault(name, whole[owners[id(parameter)]])
    for name, tensor in learner.policy.model.state_dict().items():
        result.setdefault(name, tensor)
    return result


def _whole_tensors(learner: Learner) -> dict[str, torch.Tensor]:
    """Masters, moments and reference, gathered, under `kind/name`."""
    parts: dict[str, Mapping[str, torch.Tensor]] = {"master": learner.optimizer.masters, **learner.optimizer.moments()}
    if learner.reference is not None:
        parts["reference"] = learner.reference
    parameters = learner.parameters()
    return {
        f"{kind}/{name}": learner.ranks.gather(local, parameters[name].detach())
        for kind, tensors in parts.items()
        for name, local in tensors.items()
    }


def _check_shapes(learner: Learner, file: Any, path: Path) -> None:
    wanted = {f"master/{name}": tuple(parameter.shape) for name, parameter in _named(learner)}
    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys() if name.startswith("master/")}  # noqa: SIM118
    if wanted != found:
        different = sorted(set(wanted.items()) ^ set(found.items()))
        name, shape = different[0]
        raise CheckpointError(
            f"checkpoint {path} is of another model than {learner.config.path}: {len(different)} names or shapes "
            f"differ, first {name} {list(shape)}; resume with the model it was saved from"
        )


def _check_base(learner: Learner, values: Mapping[str, Any], path: Path) -> None:
    if learner.base != values.get("base", ""):
        raise CheckpointError(
            f"checkpoint {path} holds an adapter of another base than {learner.config.path} is now: its weights have "
            "changed since; put them back as they were"
        )


def _stage_to_json(stage: Stage) -> dict[str, Any]:
    plain = {item.name: getattr(stage, item.name) for item in dataclasses.fields(stage)}
    return {**plain, "algo": stage.algo.model_dump(mode="json"), "optim": stage.optim.model_dump(mode="json")}


def _stage_from_json(values: Mapping[str, Any]) -> Stage:
    return Stage(**{**values, "algo": AlgoConfig(**values["algo"]), "optim": OptimConfig(**values["optim"])})
