"""LoRA: an adapter of low rank learns in the place of the weights (Hu et al. 2021, arXiv 2106.09685), through PEFT.

PEFT decides where the factors lie, how they start and how they are written to files, so that an adapter trained here is
loaded by plain PEFT, and one written by PEFT is loaded here. What runs is `keel.models.adapted`.

    attention   its linear layers                         target_modules     self_attn.q_proj, ...
    mlp         the linear layers of dense feed-forwards  target_modules     mlp.gate_proj, ...
    experts     the 3-dimensional weights of experts      target_parameters  mlp.experts.gate_up_proj, ...
    router      the weight that scores experts            target_parameters  mlp.router.weight, mlp.gate.weight
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from keel.models import experts as keel_experts
from keel.models.adapted import ADAPTER, adapted_modules, fit_adapter
from keel.models.adapter_files import ADAPTER_WEIGHTS, AdapterError, base_model, is_adapter
from keel.models.router import DECLARED, Router

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

TARGETS = ("attention", "mlp", "experts", "router")
_EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
_FILE_PREFIX = "base_model.model."
"""Before every name in a file of PEFT's: the path from its own wrapper to the model."""


class LoraOptions(Protocol):
    """The config's `model.lora` section, as far as it is needed here."""

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> int: ...

    @property
    def targets(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Adapter:
    """The adapter of a policy: PEFT's configuration of it, and the directory or hub id of its base."""

    config: LoraConfig
    base: str
    targets: tuple[str, ...]  # of TARGETS

    @property
    def rank(self) -> int:
        return int(self.config.r)


def adapter_places(model: nn.Module) -> dict[str, list[str]]:
    """Where an adapter can be put on: full names of modules (attention, mlp) and of parameters (experts, router).

    Works on modules without storage too. Only decoder layers count: embeddings and the head stay as they are. So do the
    dense feed-forwards of a model that has experts: PEFT reads their names as those of experts in an older layout.
    """
    places: dict[str, list[str]] = {target: [] for target in TARGETS}
    inside: dict[str, str] = {}  # a module of a kind, and the kind
    for name, module in model.named_modules():
        if ".layers." not in f".{name}.":
            continue
        parent = name.rpartition(".")[0]
        if isinstance(module, Router) or type(module).__name__ in DECLARED:
            places["router"].append(f"{name}.weight")
        elif hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
            places["experts"] += [f"{name}.{parameter}" for parameter in _EXPERT_PARAMETERS]
        elif type(module) is nn.Linear:
            places["attention" if inside.get(parent) == "attention" else "mlp"].append(name)
        elif type(module).__name__.endswith("Attention"):
            inside[name] = "attention"
    if places["experts"]:
        places["mlp"] = []
    return places


def put_on_adapter(
    model: PreTrainedModel, path: str | Path, options: LoraOptions | None, revision: str = ""
) -> Adapter | None:
    """Put on `model`, loaded from `path` or from its base, the adapter that lies there, or a fresh one if `options` ask
    for one, or none.

    Raises AdapterError for one that cannot be had, or that is not what `options` ask for.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise AdapterError(f"{path} is an adapter on the hub; download it, and give the directory")
    wanted = options if options is not None and options.rank > 0 else None
    if is_adapter(path):
        adapter = load_adapter(model, path)
        if wanted is not None:
            check_same(adapter, wanted, path)
        return adapter
    if wanted is None:
        return None
    # Made absolute: the adapter's files name it, and are read from anywhere.
    base = str(Path(path).resolve()) if Path(path).is_dir() else str(path)
    return add_adapter(model, wanted, base, revision)


def add_adapter(model: PreTrainedModel, options: LoraOptions, base: str, revision: str = "") -> Adapter:
    """Put a fresh adapter on `model` and freeze all else. Its second factor is zero, so nothing changes yet.

    The first factor is drawn from torch's global generator. Raises AdapterError for a target that the model does not
    have, or experts whose implementation is not Keel's.
    """
    from peft import LoraConfig

    chosen = _chosen(model, options.targets)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=0.0,
        target_modules=_suffixes(chosen["attention"] + chosen["mlp"]),
        target_parameters=_suffixes(chosen["experts"] + chosen["router"], parts=3) or None,
        base_model_name_or_path=base,
        revision=revision or None,
        task_type="CAUSAL_LM",
    )
    return Adapter(config, base, _inject(model, config))


def load_adapter(model: PreTrainedModel, path: str | Path) -> Adapter:
    """Put the adapter in directory `path` on `model`, which is its base, and freeze all else.

    Raises AdapterError if its file is missing or does not fit, or if it is of a kind that Keel does not run.
    """
    from peft import LoraConfig, PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, LoraConfig):
        raise AdapterError(f"{path}: an adapter of the kind {config.peft_type}; Keel runs LoRA")
    _check_plain(config, path)
    config.inference_mode = False
    targets = _inject(model, config)
    file = Path(path, ADAPTER_WEIGHTS)
    if not file.is_file():
        raise AdapterError(f"{file} is not there; an adapter's directory needs it")
    stored = {name.removeprefix(_FILE_PREFIX): tensor for name, tensor in load_file(file).items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in adapter_state(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if wanted != found:
        different = sorted(set(wanted.items()) ^ set(found.items()))
        raise AdapterError(
            f"{file} does not fit {config.base_model_name_or_path}: {len(different)} names or shapes differ, first "
            f"{different[0][0]} {list(different[0][1])}; give the base that it was trained on"
        )
    set_peft_model_state_dict(model, stored, ADAPTER)
    return Adapter(config, base_model(path)[0], targets)


def check_same(adapter: Adapter, options: LoraOptions, path: str | Path) -> None:
    """Raise AdapterError if the adapter found at `path` is not the one that `options` ask for."""
    found = {"rank": adapter.rank, "alpha": adapter.config.lora_alpha, "targets": ", ".join(adapter.targets)}
    # Empty targets are all that the model has; of an adapter that is there, what it has.
    targets = [target for target in TARGETS if target in options.targets] or adapter.targets
    wanted = {"rank": options.rank, "alpha": options.alpha, "targets": ", ".join(targets)}
    for name, asked in wanted.items():
        if asked != found[name]:
            raise AdapterError(
                f"{path} holds an adapter with another {name} than model.lora asks for: it has {found[name]}, asked is "
                f"{asked}; set model.lora.{name} to what it has, or start from the model it is on"
            )


def adapter_state(model: nn.Module, parameters: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The adapter's tensors by PEFT's names (without the prefix); `parameters` (by name) stand in for the model's."""
    from peft import get_peft_model_state_dict

    given = dict(parameters) if parameters is not None else dict(model.named_parameters())
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, given, ADAPTER, save_embedding_layers=False)
    return state


def save_adapter(
    model: nn.Module, adapter: Adapter, path: str | Path, parameters: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write the adapter to directory `path` as PEFT does, its base named in it; `parameters` as in `adapter_state`."""
    from safetensors.torch import save_file

    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    state = adapter_state(model, parameters)
    host = {_FILE_PREFIX + name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}
    save_file(host, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config: Any = adapter.config
    trained = config.target_modules, config.target_parameters, config.inference_mode
    try:
        # Lists in order, so that the same adapter makes the same bytes.
        config.target_modules = sorted(trained[0])
        config.target_parameters = sorted(trained[1]) if trained[1] else None
        config.inference_mode = True
        config.save_pretrained(directory)
    finally:
        config.target_modules, config.target_parameters, config.inference_mode = trained


@torch.no_grad()
def merge_adapter(model: nn.Module) -> None:
    """Add every adapter to the weight it is on, in place, by PEFT's own arithmetic, and take PEFT's modules out."""
    wrappers: dict[str, Any] = dict(adapted_modules(model))
    for wrapper in wrappers.values():
        wrapper.lora_A.float()  # the factors' product is rounded as late as can be
        wrapper.lora_B.float()
        wrapper.merge()
    for name, wrapper in wrappers.items():
        parent, _, child = name.rpartition(".")
        if parent not in wrappers:  # of those that wrap each other, the outermost
            setattr(model.get_submodule(parent), child, wrapper.get_base_layer())
    del model.peft_config


def count_adapter_parameters(path: str | Path, options: LoraOptions, *, trust_remote_code: bool = False) -> int:
    """Parameters of a fresh adapter on the model at `path`, from its config alone.

    Raises AdapterError for a target that the model does not have.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    base, revision = base_model(path)
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, revision=revision or "main")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return num_adapter_parameters(model, options)


def base_fingerprint(model: nn.Module) -> str:
    """A digest of what an adapter does not change: names, shapes, and the ends of each frozen parameter's values.

    An adapter is worth something on its own base only. Reading the ends costs nothing, and other weights differ there.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            flat = parameter.detach().reshape(-1)
            # In bfloat16, so that the same base read as another type is the same.
            ends = torch.cat((flat[:64], flat[-64:])).to(torch.bfloat16).float().cpu()
            digest.update(f"{name} {tuple(parameter.shape)}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()


def num_adapter_parameters(model: nn.Module, options: LoraOptions) -> int:
    """Parameters of a fresh adapter on `model`, which needs no storage."""
    chosen = _chosen(model, options.targets)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    matrices = [shapes[f"{name}.weight"] for name in chosen["attention"] + chosen["mlp"]]
    matrices += [shapes[name] for name in chosen["experts"] + chosen["router"]]
    copies = ((shape[0] if len(shape) == 3 else 1, shape[-1] + shape[-2]) for shape in matrices)
    return sum(options.rank * experts * both_sides for experts, both_sides in copies)


def _chosen(model: nn.Module, targets: Sequence[str]) -> dict[str, list[str]]:
    """The places of `targets`, or of all that the model has."""
    places = adapter_places(model)
    missing = [target for target in targets if not places[target]]
    if missing:
        has = [target for target, names in places.items() if names]
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise AdapterError(
            f"model.lora.targets: {kind} has no {', '.join(missing)}; it has {', '.join(has)}: leave the others out, "
            "or leave targets empty for all that it has"
        )
    return {target: names if not targets or target in targets else [] for target, names in places.items()}


def _suffixes(names: Sequence[str], *, parts: int = 2) -> list[str]:
    """The last `parts` parts of each name, each once: PEFT takes what ends so."""
    return sorted({".".join(name.split(".")[-parts:]) for name in names})


def _inject(model: PreTrainedModel, config: LoraConfig) -> tuple[str, ...]:
    """Put PEFT's modules in and give them Keel's forward; returns the targets they are on."""
    from peft import inject_adapter_in_model

    if config.target_parameters and any(
        name.endswith(f".{target}") for target in config.target_parameters for name in adapter_places(model)["experts"]
    ):
        implementation = getattr(model.config, "_experts_implementation", None)
        if implementation != keel_experts.IMPLEMENTATION:
            raise AdapterError(
                f"an adapter on experts needs model.experts = 'keel', got {implementation!r}; set it, or leave "
                "experts out of model.lora.targets"
            )
    places = {name: target for target, names in adapter_places(model).items() for name in names}
    inject_adapter_in_model(config, model, ADAPTER)
    try:
        fit_adapter(model)
    except ValueError as error:
        raise AdapterError(f"{error}; leave the others out") from error
    return _targets_of(model, places)


def _targets_of(model: nn.Module, places: Mapping[str, str]) -> tuple[str, ...]:
    """The targets that adapters are on. Raises AdapterError for one that is on anything else."""
    found = set()
    for name, module in adapted_modules(model).items():
        place = ".".join(part for part in name.split(".") if part != "base_layer")
        parameter = getattr(module, "parameter_name", None)
        place = f"{place}.{parameter}" if parameter else place
        if place not in places:
            raise AdapterError(
                f"{place} has an adapter, which Keel would not run; it runs those on attention, mlp, experts and "
                "router of decoder layers"
            )
        found.add(places[place])
    return tuple(target for target in TARGETS if target in found)


def _check_plain(config: LoraConfig, path: str | Path) -> None:
    """Raise AdapterError for a variant of LoRA that is more than two factors and a scale."""
    usual: dict[str, tuple[Any, ...]] = {
        "use_dora": (False,),
        "lora_bias": (False,),
        "bias": ("none",),
        "fan_in_fan_out": (False,),
        "lora_dropout": (0, 0.0),
        "modules_to_save": (None, []),
        "trainable_token_indices": (None,),
        "layer_replication": (None,),
    }
    for name, values in usual.items():
        if (value := getattr(config, name, values[0])) not in values:
            raise AdapterError(f"{path}: {name} = {value!r}, which Keel does not run; it runs plain LoRA")
