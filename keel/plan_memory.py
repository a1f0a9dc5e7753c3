"""How much memory a run takes, from sizes alone, and whether it fits: a verdict, and the option to turn if not.

Weights, gradients and optimizer state are counted exactly; activations by a formula that a test holds to within a
factor of two of what autograd really keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from keel.config import TrainConfig

if TYPE_CHECKING:
    from keel.models.info import ModelInfo

MIB, GIB = 2**20, 2**30
FLOAT32_BYTES = 4
RESERVE = 0.1
"""Share of a device that an estimate must leave free: for CUDA itself, gaps between blocks, what is not counted."""
USUAL_CARDS_GIB = (16, 24, 32, 40, 48, 80, 96, 141, 192, 288)


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
        """Everything at once."""
        return sum(getattr(self, field.name) for field in fields(self))

    def peak(self, *, ranks: int, on_card: bool, frees_cache: bool) -> int:
        """The most that is held at a time: on the fullest card (of a rank and the engine), or in the machine.

        With `frees_cache` keys and values lie there while episodes run, gradients and activations while it learns.
        """
        share = ranks if on_card else 1
        copies = 1 if on_card else ranks
        kept = (self.weights + self.optimizer + self.reference) // share + self.engine_weights
        learning = self.gradients // share + copies * (self.activations + self.head)
        return kept + (max(learning, self.key_values) if frees_cache else learning + self.key_values)


NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "reference": "reference",
    "activations": "activations",
    "head": "output head",
    "key_values": "key-values",
    "engine_weights": "engine's copy",
}


def estimate_memory(config: TrainConfig, info: ModelInfo, model_config: Any, parameters: int, trained: int) -> Memory:
    """The memory of `config` for a model of `parameters` parameters, of which (or of whose adapter) `trained` learn.

    `trained` above zero and `config.model.lora.rank` above zero mean an adapter: then the reference is the base with
    the adapter off, and costs nothing.
    """
    from keel.ops.logprobs import VOCABULARY_TILE

    adapter = config.model.lora.rank > 0
    size = 2 if config.model.dtype == "bfloat16" else FLOAT32_BYTES
    weights = (parameters + (trained if adapter else 0)) * size
    masters = trained * FLOAT32_BYTES if size < FLOAT32_BYTES else 0  # a float32 weight is its own master
    own_copy = config.engine.process == "separate" or config.learner.ranks > 1 or config.rollout.max_staleness > 0
    slot_tokens = config.engine.max_sequence_tokens or config.rollout.max_sequence_tokens
    key_values = 2 * info.num_layers * info.num_kv_heads * info.head_dim * size * config.engine.slots * slot_tokens
    chunk = min(config.model.head_chunk_tokens, config.batch.max_tokens)
    words = info.vocab_size if config.numerics == "exact" else min(info.vocab_size, VOCABULARY_TILE)
    return Memory(
        weights=weights,
        gradients=trained * FLOAT32_BYTES,
        optimizer=2 * trained * FLOAT32_BYTES + masters,
        reference=weights if config.algo.kl.coefficient > 0 and not adapter else 0,
        activations=_activations(config, info, model_config, size),
        head=words * (3 * chunk + 2 * info.hidden_size) * FLOAT32_BYTES,  # tiles of logits, and of the head's gradient
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


def verdict(config: TrainConfig, memory: Memory, peak: int, device_bytes: int | None) -> str:
    """Whether `peak` bytes fit a device of `device_bytes` (None: not known), and if not, what to turn."""
    needed = peak / (1 - RESERVE)
    if device_bytes is None:
        smallest = next((size for size in USUAL_CARDS_GIB if size * GIB >= needed), None)
        if smallest is not None:
            return f"fits a card of {smallest} GiB"
        return f"does not fit any usual card: {knob(config, memory)}"
    if needed <= device_bytes:
        return f"fits in {gibibytes(device_bytes)}"
    return f"does not fit in {gibibytes(device_bytes)}: {knob(config, memory)}"


def knob(config: TrainConfig, memory: Memory) -> str:
    """The option that saves most, as an assignment where there is an obvious one."""
    model, engine = config.model, config.engine
    training = memory.gradients + memory.optimizer
    candidates = {
        'set model.dtype = "bfloat16"': memory.weights // 2 if model.dtype == "float32" else 0,
        "set model.lora.rank = 32, so that an adapter learns in the place of the weights": (
            training + memory.reference if model.lora.rank == 0 else 0
        ),
        "set model.gradient_checkpointing = true": 0 if model.gradient_checkpointing else memory.activations * 3 // 4,
        f"lower batch.max_tokens = {config.batch.max_tokens}": memory.activations // 2,
        f"lower model.head_chunk_tokens = {model.head_chunk_tokens}": memory.head // 2,
        f"lower engine.slots = {engine.slots} or rollout.max_sequence_tokens": memory.key_values // 2,
        'set engine.process = "same", so that the engine samples from the learner\'s own weights': (
            memory.engine_weights if engine.process == "separate" and config.rollout.max_staleness == 0 else 0
        ),
    }
    best = max(candidates, key=lambda name: candidates[name])
    if candidates[best] < memory.weights // 8:
        return "the weights alone are too large; take a smaller model, or more learner.ranks"
    return best


def describe_memory(memory: Memory, peak: int) -> str:
    """The memory in one line: the most at a time, and the parts."""
    parts = ", ".join(
        f"{name} {gibibytes(count)}" for field, name in NAMES.items() if (count := getattr(memory, field))
    )
    return f"about {gibibytes(peak)} at most: {parts}"


def gibibytes(count: int) -> str:
    """Bytes for people: MiB below a GiB."""
    return f"{count / MIB:,.1f} MiB" if count < GIB else f"{count / GIB:,.1f} GiB"
