"""`keel train --dry-run`: what a run would take, from its config and the model's config.json alone.

Memory is an estimate: weights, gradients and optimizer state are counted exactly; activations by a formula that a
test holds to within a factor of two of what autograd really keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from keel.config import ModelConfig, TrainConfig
from keel.config_problems import ConfigError, Problem, shown

if TYPE_CHECKING:
    from keel.models.info import ModelInfo

MIB = 2**20
FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, of the learner (all ranks together) and of the engine."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int  # of one micro-batch, on one rank
    head: int  # one chunk of logits and its gradient
    key_values: int
    engine_weights: int

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.reference
            + self.activations
            + self.head
            + self.key_values
            + self.engine_weights
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """A run before it runs. Tokens are upper bounds: every episode as long as it may be."""

    model_type: str
    parameters: int
    active_parameters: int  # used for one token: of the experts only top-k
    episodes_per_step: int
    policy_tokens_per_step: int
    tokens_per_step: int
    micro_batches_per_step: int
    memory: Memory
    stages: tuple[str, ...]
    invariants: tuple[str, ...]


def make_plan(config: TrainConfig) -> Plan:
    """The plan of `config`. Raises ConfigError if `model.path` has no config that `transformers` can read."""
    import torch
    from transformers import AutoModelForCausalLM

    from keel.models.info import model_info

    model = config.model
    try:
        model_config = _model_config(model)
        info = model_info(model_config)
    except (OSError, ValueError) as error:
        fix = "give a Hugging Face directory or hub id of a causal model; `keel tiny-model` makes a small one"
        where = "model.tiny" if model.tiny.preset else "model.path"
        raise ConfigError([Problem(where, str(error), shown(model.path), fix)]) from error
    with torch.device("meta"):  # shapes without storage
        shapes = AutoModelForCausalLM.from_config(model_config, trust_remote_code=model.trust_remote_code)
    parameters = {name: parameter.numel() for name, parameter in shapes.named_parameters()}
    total = sum(parameters.values())
    rollout = config.rollout
    episodes = rollout.groups_per_step * rollout.group_size
    tokens = episodes * rollout.max_sequence_tokens
    return Plan(
        model_type=info.model_type,
        parameters=total,
        active_parameters=_active(parameters, info),
        episodes_per_step=episodes,
        policy_tokens_per_step=episodes * min(rollout.max_turns * rollout.max_new_tokens, rollout.max_sequence_tokens),
        tokens_per_step=tokens,
        micro_batches_per_step=-(-tokens // config.batch.max_tokens),
        memory=_memory(config, info, model_config, total),
        stages=_stages(config),
        invariants=_invariants(config, info),
    )


def _model_config(model: ModelConfig) -> Any:
    """The `transformers` configuration of the model that the run starts from."""
    from transformers import AutoConfig

    from keel.models.tiny import tiny_config

    if model.tiny.preset:
        return tiny_config(model.tiny.preset, vocab_size=model.tiny.vocab_size, **model.tiny.options)
    return AutoConfig.from_pretrained(
        model.path, trust_remote_code=model.trust_remote_code, revision=model.revision or "main"
    )


def _active(parameters: dict[str, int], info: ModelInfo) -> int:
    experts = sum(count for name, count in parameters.items() if ".experts." in name)
    idle = experts * (info.num_experts - info.top_k) // info.num_experts if info.num_experts else 0
    return sum(parameters.values()) - idle


def _memory(config: TrainConfig, info: ModelInfo, model_config: Any, parameters: int) -> Memory:
    size = 2 if config.model.dtype == "bfloat16" else FLOAT32_BYTES
    weights = parameters * size
    masters = parameters * FLOAT32_BYTES if size < FLOAT32_BYTES else 0  # a float32 weight is its own master
    own_copy = config.engine.process == "separate" or config.learner.ranks > 1 or config.rollout.max_staleness > 0
    slot_tokens = config.engine.max_sequence_tokens or config.rollout.max_sequence_tokens
    key_values = 2 * info.num_layers * info.num_kv_heads * info.head_dim * size * config.engine.slots * slot_tokens
    chunk = min(config.model.head_chunk_tokens, config.batch.max_tokens)
    return Memory(
        weights=weights,
        gradients=parameters * FLOAT32_BYTES,
        optimizer=2 * parameters * FLOAT32_BYTES + masters,
        reference=weights if config.algo.kl.coefficient > 0 else 0,
        activations=_activations(config, info, model_config, size),
        head=2 * chunk * info.vocab_size * FLOAT32_BYTES,
        key_values=key_values,
        engine_weights=weights if own_copy else 0,
    )


def _activations(config: TrainConfig, info: ModelInfo, model_config: Any, size: int) -> int:
    """What autograd keeps for one micro-batch: per token and layer, elements of the compute type.

    Norms keep their float32 input twice; attention its input, q, k, v before and after rope, and its output; an expert
    (or the MLP) its input, gate and up, their product, and its output. With checkpointing: a layer's input per layer,
    and one layer whole.
    """
    text = model_config.get_text_config(decoder=True)
    moe = getattr(text, "moe_intermediate_size", None) if info.num_experts else None
    intermediate = int(moe or text.intermediate_size)
    heads = (info.num_heads + 2 * info.num_kv_heads) * info.head_dim
    norms = 2 * (info.hidden_size * size + 2 * info.hidden_size * FLOAT32_BYTES)
    attention = (info.hidden_size + 2 * heads + 2 * info.num_heads * info.head_dim) * size
    experts = max(1, info.top_k) * (2 * info.hidden_size + 5 * intermediate) * size
    layer = norms + attention + experts
    tokens = config.batch.max_tokens
    if config.model.gradient_checkpointing:
        return tokens * (info.num_layers * info.hidden_size * size + layer)
    return tokens * info.num_layers * layer


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


def describe_plan(plan: Plan) -> str:
    """The plan as text."""
    memory = plan.memory
    parts = (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("reference", memory.reference),
        ("activations", memory.activations),
        ("output head", memory.head),
        ("key-values", memory.key_values),
        ("engine's copy", memory.engine_weights),
    )
    lines = [
        f"model       {plan.model_type}: {plan.parameters:,} parameters, {plan.active_parameters:,} active per token",
        (
            f"a step      {plan.episodes_per_step} episodes, at most {plan.tokens_per_step:,} tokens, "
            f"{plan.policy_tokens_per_step:,} of them drawn, in at most {plan.micro_batches_per_step} micro-batches"
        ),
        f"memory      about {_mebibytes(memory.total)}: "
        + ", ".join(f"{name} {_mebibytes(count)}" for name, count in parts if count),
        *(f"stage {number}     {text}" for number, text in enumerate(plan.stages, start=1)),
        *(f"checked     {text}" for text in plan.invariants),
    ]
    return "\n".join(lines)


def _mebibytes(count: int) -> str:
    return f"{count / MIB:,.1f} MiB" if count < 1024 * MIB else f"{count / (1024 * MIB):,.1f} GiB"
