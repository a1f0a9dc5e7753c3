"""`keel train --dry-run`: what a run would take, from its config and the model's config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.config import ModelConfig, TrainConfig
from keel.config_problems import ConfigError, Problem, shown
from keel.plan_memory import Memory, describe_memory, estimate_memory, gibibytes, verdict

if TYPE_CHECKING:
    from keel.models.info import ModelInfo


@dataclass(frozen=True, slots=True)
class Plan:
    """A run before it runs. Tokens are upper bounds: every episode as long as it may be."""

    model_type: str
    parameters: int
    active_parameters: int  # used for one token: of the experts only top-k
    trained_parameters: int  # those of the adapter, if there is one
    adapter: str  # "" without one
    stored_as: str  # how the files hold the weights, if not as they are: "mxfp4"
    episodes_per_step: int
    policy_tokens_per_step: int
    tokens_per_step: int
    micro_batches_per_step: int
    memory: Memory
    peak_bytes: int  # the most at a time, on one device
    device: str
    device_bytes: int | None  # None: the device is not on this machine
    verdict: str
    stages: tuple[str, ...]
    invariants: tuple[str, ...]


def make_plan(config: TrainConfig) -> Plan:
    """The plan of `config`.

    Raises ConfigError if `model.path` has no config that `transformers` can read and Keel can train, or needs code of
    its own that it was not told to run; if the adapter asked for has no place on the model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from keel.device import frees_cache, seen_device, total_bytes
    from keel.models.mxfp4 import stored_as

    model = config.model
    model_config, info = read_model_config(model)
    with torch.device("meta"):  # shapes without storage
        shapes = AutoModelForCausalLM.from_config(model_config, trust_remote_code=model.trust_remote_code)
    parameters = {name: parameter.numel() for name, parameter in shapes.named_parameters()}
    total = sum(parameters.values())
    trained, adapter = _trained(model, shapes, total)
    memory = estimate_memory(config, info, model_config, total, trained)
    device = seen_device(config.device)
    on_card = device is None or device.type == "cuda"
    frees = frees_cache(config, device if device is not None else torch.device("cuda"))
    peak = memory.peak(ranks=config.learner.ranks, on_card=on_card, frees_cache=frees)
    device_bytes = None if device is None else total_bytes(device)
    rollout = config.rollout
    episodes = rollout.groups_per_step * rollout.group_size
    tokens = episodes * rollout.max_sequence_tokens
    return Plan(
        model_type=info.model_type,
        parameters=total,
        active_parameters=_active(parameters, info),
        trained_parameters=trained,
        adapter=adapter,
        stored_as=stored_as(model_config),
        episodes_per_step=episodes,
        policy_tokens_per_step=episodes * min(rollout.max_turns * rollout.max_new_tokens, rollout.max_sequence_tokens),
        tokens_per_step=tokens,
        micro_batches_per_step=-(-tokens // config.batch.max_tokens),
        memory=memory,
        peak_bytes=peak,
        device=_device_words(config, device),
        device_bytes=device_bytes,
        verdict=verdict(config, memory, peak, device_bytes),
        stages=_stages(config),
        invariants=_invariants(config, info),
    )


def read_model_config(model: ModelConfig) -> tuple[Any, ModelInfo]:
    """The `transformers` configuration of the model that a run starts from, and its sizes; nothing else is read.

    Raises ConfigError if there is none, or none that Keel can train, or if it needs code that is not to be run.
    """
    from keel.models.info import model_info
    from keel.models.mxfp4 import loading_options

    try:
        model_config = _model_config(model)
        loading_options(model_config)
        return model_config, model_info(model_config)
    except (OSError, ValueError) as error:
        where = "model.tiny" if model.tiny.preset else "model.path"
        fix = "give a Hugging Face directory or hub id of a causal model; `keel tiny-model` makes a small one"
        if "trust_remote_code" in str(error):
            what = "the model comes with code of its own, which is not run unless you say so"
            fix = "read that code, and if you trust it set model.trust_remote_code = true"
            raise ConfigError([Problem(where, what, shown(model.path), fix)]) from error
        raise ConfigError([Problem(where, str(error), shown(model.path), fix)]) from error


def _model_config(model: ModelConfig) -> Any:
    """The `transformers` configuration of the model that the run starts from."""
    from transformers import AutoConfig

    from keel.models.adapter_files import base_model
    from keel.models.tiny import tiny_config

    if model.tiny.preset:
        return tiny_config(model.tiny.preset, vocab_size=model.tiny.vocab_size, **model.tiny.options)
    if model.path.startswith(("/", ".", "~")) and not Path(model.path).is_dir():
        raise OSError(f"there is no directory {model.path}")  # `transformers` takes it for a hub id, and finds that odd
    base, revision = base_model(model.path, model.revision)
    return AutoConfig.from_pretrained(base, trust_remote_code=model.trust_remote_code, revision=revision or "main")


def _trained(model: ModelConfig, shapes: Any, total: int) -> tuple[int, str]:
    """How many parameters learn, and where their adapter is, "" if there is none. Raises ConfigError for no place."""
    from keel.models.adapter_files import AdapterError
    from keel.models.lora import adapter_places, num_adapter_parameters

    if model.lora.rank == 0:
        return total, ""
    try:
        trained = num_adapter_parameters(shapes, model.lora)
    except AdapterError as error:
        fix = "choose among the targets that the model has"
        raise ConfigError([Problem("model.lora.targets", str(error), shown(list(model.lora.targets)), fix)]) from error
    places = model.lora.targets or [target for target, names in adapter_places(shapes).items() if names]
    return trained, f"rank {model.lora.rank} on {', '.join(places)}"


def _device_words(config: TrainConfig, device: Any) -> str:
    from keel.device import describe_device

    if device is None:
        return f"{config.device} (none on this machine)"
    return describe_device(device) + (f", {config.learner.ranks} ranks" if config.learner.ranks > 1 else "")


def _active(parameters: dict[str, int], info: ModelInfo) -> int:
    experts = sum(count for name, count in parameters.items() if ".experts." in name)
    idle = experts * (info.num_experts - info.top_k) // info.num_experts if info.num_experts else 0
    return sum(parameters.values()) - idle


def _stages(config: TrainConfig) -> tuple[str, ...]:
    stages = []
    warm, evaluation = config.warm_start, config.eval
    held_out = f"{evaluation.num_tasks} held-out tasks"
    if evaluation.num_tasks:
        stages.append(f"evaluate {held_out}")
    if warm.steps:
        stages.append(f"warm start: {warm.steps} steps of {warm.demonstrations_per_step} demonstrations")
        stages += [f"evaluate {held_out}"] if evaluation.num_tasks else []
    if config.steps:
        rollout = config.rollout
        every = f", evaluating every {evaluation.every}" if evaluation.every else ""
        stages.append(
            f"reinforcement: {config.steps} steps of {rollout.groups_per_step} tasks x {rollout.group_size} attempts, "
            f"{config.algo.updates_per_batch} update(s) each{every}"
        )
        stages += [f"evaluate {held_out}"] if evaluation.num_tasks else []
    return tuple(stages)


def _invariants(config: TrainConfig, info: ModelInfo) -> tuple[str, ...]:
    found = ["every engine log-prob against the learner's (mismatch/*), each step"]
    if config.algo.updates_per_batch == 1:
        found.append("policy/ratio_max_dev is exactly 0: with one update per batch nothing is old")
    if config.learner.recompute_every:
        found.append(
            f"policy/recompute_max_dev is exactly 0: a second pass every {config.learner.recompute_every} step(s)"
        )
    found.append("loss and gradient are finite, else the update is skipped and counted")
    if info.num_experts and config.engine.return_routes:
        found.append("expert choices of the engine against the learner's")
    return tuple(found)


def describe_start(plan: Plan) -> str:
    """What a run says of memory when it starts, in one line."""
    return f"memory {describe_memory(plan.memory, plan.peak_bytes)}; {plan.verdict} ({plan.device})"


def describe_plan(plan: Plan) -> str:
    """The plan as text."""
    lines = [
        f"model       {plan.model_type}: {plan.parameters:,} parameters, {plan.active_parameters:,} active per token",
        *([f"adapter     {plan.adapter}: {plan.trained_parameters:,} parameters learn"] if plan.adapter else []),
        *([f"stored as   {plan.stored_as}: read exactly, held and exported unquantized"] if plan.stored_as else []),
        (
            f"a step      {plan.episodes_per_step} episodes, at most {plan.tokens_per_step:,} tokens, "
            f"{plan.policy_tokens_per_step:,} of them drawn, in at most {plan.micro_batches_per_step} micro-batches"
        ),
        f"device      {plan.device}" + ("" if plan.device_bytes is None else f", {gibibytes(plan.device_bytes)}"),
        f"memory      {describe_memory(plan.memory, plan.peak_bytes)}",
        f"verdict     {plan.verdict}",
        *(f"stage {number}     {text}" for number, text in enumerate(plan.stages, start=1)),
        *(f"checked     {text}" for text in plan.invariants),
    ]
    return "\n".join(lines)
