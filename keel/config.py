"""Every option of a run, one section per component, help text beside each.

A component is handed its own section, never the whole. Reading TOML files, `--set` and error messages with file and
line are in `keel.config_load`; this module is import-light (standard library and pydantic).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from keel.config_base import Dtype as Dtype  # noqa: PLC0414 (re-exported, as are the next three)
from keel.config_base import Plugin as Plugin  # noqa: PLC0414
from keel.config_base import Plugins as Plugins  # noqa: PLC0414
from keel.config_base import Section as Section  # noqa: PLC0414
from keel.config_monitor import MonitorConfig
from keel.config_numerics import refuse_with_exact
from keel.config_router import RouterConfig
from keel.config_sync import SyncConfig
from keel.config_vllm import VllmConfig, refuse_with_vllm
from keel.distortion import Distortion
from keel.types import UserFault


class TinyConfig(Section):
    preset: Literal["", "gpt_oss", "qwen3", "qwen3_moe"] = Field(
        "", description="build a small random model of this shape instead of reading model.path; empty: none"
    )
    vocab_size: int = Field(700, ge=300, description="tokens of its vocabulary, learned from the demonstrations")
    options: dict[str, Any] = Field(default_factory=dict, description="fields of its transformers configuration")


class LoraConfig(Section):
    rank: int = Field(0, ge=0, description="rank of the adapter that learns in the place of the weights; 0: none")
    alpha: int = Field(32, ge=1, description="the adapter's product is scaled by alpha / rank")
    targets: tuple[Literal["attention", "experts", "router", "mlp"], ...] = Field(
        (), description="what the adapter is on ('mlp': of dense layers); empty: all of these that the model has"
    )
    dropout: float = Field(0.0, ge=0, description="only 0: a random forward pass is not the policy that acted")


class ModelConfig(Section):
    path: str = Field("", description="Hugging Face directory or hub id of the starting weights")
    tiny: TinyConfig = Field(default_factory=TinyConfig, description="a small model made for this run")
    dtype: Dtype = Field("float32", description="type of the forward pass; master weights are always float32")
    attention: str = Field("keel", description="attention implementation of the learner; 'keel' keeps sinks exact")
    experts: str = Field("keel", description="experts implementation; 'keel', or one of transformers' own names")
    gradient_checkpointing: bool = Field(False, description="recompute layers in the backward pass to save memory")
    head_chunk_tokens: int = Field(
        1024, ge=1, description="tokens per chunk of the output head; no [T, V] is ever held"
    )
    head_dtype: Literal["model", "float32"] = Field(
        "model", description="type of the head's products; 'float32' rounds no logit to bfloat16, a tile at a time"
    )
    trust_remote_code: bool = Field(False, description="run code shipped with a model; off unless said")
    revision: str = Field("", description="branch, tag or commit of a hub id; empty: its main branch")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="train a low-rank adapter (PEFT) of the weights")
    router: RouterConfig = Field(default_factory=RouterConfig, description="what chooses experts")


class ChatConfig(Section):
    format: Literal["auto", "harmony", "template"] = Field(
        "auto",
        description="'harmony' (GPT-OSS), 'template' (the tokenizer's own chat template), or chosen by tokenizer",
    )
    reasoning_effort: Literal["low", "medium", "high"] = Field("low", description="Harmony's reasoning effort")
    system_date: str = Field("", description="'Current date' line of Harmony's system message; empty: none")
    system_message: Literal["full", "none"] = Field(
        "full", description="Harmony's system message; 'none' saves its tokens for a small model that never learned it"
    )


class EnvConfig(Section):
    id: str = Field("", description="environment: package.module:Class or a built-in's short name")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword-only arguments of the environment")
    reward: Plugin = Field(Plugin(id="none"), description="reward added to the environment's own at an episode's end")
    reset_timeout_s: float = Field(60.0, gt=0, description="seconds for reset() before the episode is env_timeout")
    step_timeout_s: float = Field(60.0, gt=0, description="seconds for step() before the episode is env_timeout")


class RolloutConfig(Section):
    groups_per_step: int = Field(16, ge=1, description="tasks per training step")
    group_size: int = Field(16, ge=1, description="attempts per task")
    max_turns: int = Field(4, ge=1, description="replies per episode; one more is 'truncated'")
    max_new_tokens: int = Field(256, ge=1, description="tokens per reply")
    max_sequence_tokens: int = Field(1024, ge=8, description="tokens per segment, prompt included")
    temperature: float = Field(1.0, ge=0, description="sampling temperature; 0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus share; 1.0 is off")
    top_k: int = Field(0, ge=0, description="most likely tokens kept; 0 is off")
    max_staleness: int = Field(0, ge=0, description="policy versions a rollout may be behind; 0 is on-policy")
    concurrency: int = Field(0, ge=0, description="episodes at once; 0: as many as the engine takes")


class EngineConfig(Section):
    id: str = Field("embedded", description="'embedded', 'vllm', or package.module:Class of the engine protocol")
    process: Literal["same", "separate"] = Field("same", description="'separate' runs the engine in its own process")
    slots: int = Field(64, ge=1, description="sequences decoded at once; more sessions take the slots of those at rest")
    prefill_tile: int = Field(128, ge=8, description="rows with which a prefill pass is full enough to run")
    max_sequence_tokens: int = Field(0, ge=0, description="key-value slots per sequence; 0: the rollout's limit")
    return_routes: bool = Field(True, description="return expert choices of mixture-of-experts models")
    free_cache: Literal["auto", "on", "off"] = Field(
        "auto", description="give keys and values back while the learner learns; auto: on CUDA, with max_staleness = 0"
    )
    vllm: VllmConfig = Field(default_factory=VllmConfig, description="the server of engine.id = 'vllm'")
    distortions: tuple[Distortion, ...] = Field(
        (), description="faults planted in the engine on purpose (docs/faults.md); never in a run that is to be trusted"
    )


class KLConfig(Section):
    coefficient: float = Field(0.0, ge=0, description="weight of the KL penalty to the reference; 0 loads no reference")
    estimator: Literal["k1", "k2", "k3"] = Field("k3", description="per-token estimator of the KL divergence")


class AlgoConfig(Section):
    advantage: Plugin = Field(Plugin(id="group_mean"), description="rewards [G] -> advantages [G]")
    loss: Plugin = Field(Plugin(id="ppo_clip"), description="per-token policy loss")
    correction: Plugins = Field(
        (), description="importance weights and rejections against the engine's log-probs, one or several in order"
    )
    trust_region: Plugins = Field((), description="which tokens may still move the policy, one or several masks")
    reduction: Plugin = Field(Plugin(id="token_mean"), description="per-token losses -> the update's loss")
    whiten_advantages: bool = Field(
        False, description="scale the batch's advantages to mean 0 and standard deviation 1 over its loss tokens"
    )
    rejected_in_baseline: bool = Field(
        False, description="compare with attempts that a correction left out whole; off: they leave before statistics"
    )
    kl: KLConfig = Field(default_factory=KLConfig, description="penalty to a frozen reference")
    entropy_coefficient: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    updates_per_batch: int = Field(1, ge=1, description="optimizer steps per batch of rollouts")


class BatchConfig(Section):
    max_tokens: int = Field(4096, ge=16, description="tokens per micro-batch, packed without padding")


class OptimConfig(Section):
    lr: float = Field(1e-4, gt=0, description="AdamW learning rate after warm-up")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta1")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW beta2")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay, on matrices only")
    max_grad_norm: float = Field(1.0, gt=0, description="global gradient norm clip")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="decay after warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    final_lr_fraction: float = Field(0.0, ge=0, le=1, description="share of lr left at the end of a decaying schedule")


class LearnerConfig(Section):
    ranks: int = Field(1, ge=1, description="learner processes; more than one shards the model with FSDP2")
    recompute_every: int = Field(
        1, ge=0, description="steps between recompute checks (policy/recompute_max_dev); 0: off"
    )
    replay_routes: Literal["auto", "on", "off"] = Field(
        "auto", description="use the experts that the engine chose; auto: wherever they are known; on: refuse without"
    )
    missing_support: Literal["refuse", "own_cut"] = Field(
        "refuse",
        description="top-p or top-k by an engine that does not say what was left to choose from: refuse, or make the "
        "cut again in the learner, with the drawn token always inside",
    )
    share_prefixes: Literal["auto", "on", "off"] = Field(
        "auto",
        description="compute what the sequences of a micro-batch have in common (a group's prompt) once; auto: where "
        "the model can and it saves a tenth of the tokens; never in exact numerics",
    )
    peak_tflops: float = Field(
        0.0,
        ge=0,
        description="what one device can do in model.dtype, 10^12 operations a second, for perf/mfu; 0: the data sheet "
        "of a known card, measured on a CPU",
    )
    distortions: tuple[Distortion, ...] = Field(
        (), description="faults planted in the learner on purpose (docs/faults.md); likewise"
    )


class WarmStartOptimConfig(OptimConfig):
    lr: float = Field(2e-3, gt=0, description="AdamW learning rate after warm-up")


class WarmStartConfig(Section):
    steps: int = Field(0, ge=0, description="supervised steps on demonstrations before reinforcement; 0: none")
    demonstrations: str = Field("", description="package.module:name of demonstrations; empty: the environment's own")
    demonstrations_per_step: int = Field(64, ge=1, description="demonstrations per supervised step")
    optim: WarmStartOptimConfig = Field(default_factory=WarmStartOptimConfig, description="optimizer of the warm start")


class EvalConfig(Section):
    num_tasks: int = Field(0, ge=0, description="held-out tasks per evaluation; 0: no evaluation")
    attempts: int = Field(1, ge=1, description="attempts per task; several give pass@k")
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="the k of pass@k, at most attempts; empty: 1, 2, 4, ... and attempts"
    )
    every: int = Field(0, ge=0, description="reinforcement steps between evaluations; 0: only at the ends of a stage")
    temperature: float = Field(1.0, ge=0, description="sampling temperature of evaluation; 0 is greedy")
    seed: int = Field(0, description="seed of evaluation draws, the same every time")


class CheckpointConfig(Section):
    every: int = Field(50, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")


class RecordConfig(Section):
    every: int = Field(1, ge=0, description="steps between step records (token streams); 0: none")
    keep: int = Field(0, ge=0, description="newest step records kept; 0: all")


class LogConfig(Section):
    live: Literal["auto", "on", "off"] = Field("auto", description="live terminal display; auto: when it is a terminal")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field((), description="extra metric sinks")
    project: str = Field("keel", description="project name given to trackers")


class ReportConfig(Section):
    every_s: float = Field(
        60.0, ge=0, description="least seconds between rewrites of report.html during the run; 0: none on the way"
    )
    at_end: bool = Field(True, description="write report.html when the run ends, however it ends")


class TrainConfig(Section):
    seed: int = Field(0, ge=0, description="seed of everything: tasks, draws, initialization")
    steps: int = Field(100, ge=0, description="reinforcement steps")
    run_dir: str = Field("", description="run directory; empty: runs/<date>-<name>")
    name: str = Field("run", description="name of the run")
    num_threads: int = Field(0, ge=0, description="CPU threads of the learner and embedded engine; 0: torch's choice")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="'cpu', 'cuda', 'cuda:1' (one card), or 'auto': a CUDA card if torch sees one, else the CPU",
    )
    numerics: Literal["fast", "exact"] = Field(
        "fast",
        description="'exact': the embedded engine and the learner give a token the same log-prob to the bit, in fixed "
        "tiles, on a CPU; 'fast': to rounding",
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="the policy")
    chat: ChatConfig = Field(default_factory=ChatConfig, description="messages to tokens")
    env: EnvConfig = Field(default_factory=EnvConfig, description="where tasks and rewards come from")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig, description="how episodes are produced")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="who samples")
    sync: SyncConfig = Field(default_factory=SyncConfig, description="new weights from the learner to the engine")
    algo: AlgoConfig = Field(default_factory=AlgoConfig, description="what is optimized")
    batch: BatchConfig = Field(default_factory=BatchConfig, description="packing")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="optimizer of reinforcement")
    learner: LearnerConfig = Field(default_factory=LearnerConfig, description="who learns")
    warm_start: WarmStartConfig = Field(default_factory=WarmStartConfig, description="supervised stage before")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="held-out evaluation")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="resumable state")
    record: RecordConfig = Field(default_factory=RecordConfig, description="step records")
    monitor: MonitorConfig = Field(default_factory=MonitorConfig, description="rules that judge every update")
    log: LogConfig = Field(default_factory=LogConfig, description="display and trackers")
    report: ReportConfig = Field(default_factory=ReportConfig, description="the page that shows the run")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        conflicts = find_conflicts(self)
        if conflicts:
            raise ImpossibleConfigError(conflicts)
        return self

    def stages(self) -> tuple[Stage, ...]:
        """What the learner does from the first step to the last, in order; a stage of no steps is left out."""
        supervised = AlgoConfig(loss=Plugin(id="cross_entropy"))
        planned = (
            Stage(
                "warm_start",
                0,
                self.warm_start.steps,
                supervised,
                self.warm_start.optim,
                closing_evaluation="after_warm_start",
            ),
            Stage(
                "reinforcement",
                self.warm_start.steps,
                self.steps,
                self.algo,
                self.optim,
                closing_evaluation="final",
                eval_every=self.eval.every,
                record_every=self.record.every,
            ),
        )
        return tuple(stage for stage in planned if stage.num_steps > 0)


@dataclass(frozen=True)
class Stage:
    """Training steps `first_step` to `first_step + num_steps - 1` of a learner, under one algorithm and one optimizer.

    A mode is a value: supervised learning is another loss, reinforcement the same learner.
    """

    name: Literal["warm_start", "reinforcement"]
    first_step: int
    num_steps: int
    algo: AlgoConfig
    optim: OptimConfig
    closing_evaluation: str = "final"  # name of the evaluation after its last step
    eval_every: int = 0  # steps between evaluations on the way; 0: none
    record_every: int = 0  # steps between step records; 0: none


@dataclass(frozen=True, slots=True)
class Conflict:
    """Options that cannot be had together: their dotted names, what is wrong, what was given, what to do."""

    options: tuple[str, ...]
    what: str
    got: str
    fix: str


class ImpossibleConfigError(UserFault, ValueError):
    """A combination of options that no run can honour; `conflicts` lists all that were found."""

    def __init__(self, conflicts: list[Conflict]) -> None:
        self.conflicts = conflicts
        super().__init__("; ".join(f"{conflict.what} (got {conflict.got}): {conflict.fix}" for conflict in conflicts))


GROUP_ADVANTAGES = ("group_mean", "group_mean_std", "leave_one_out")


def find_conflicts(config: TrainConfig) -> list[Conflict]:
    """Every impossible combination in `config`."""
    found: list[Conflict] = []

    def refuse(wrong: bool, options: tuple[str, ...], what: str, fix: str) -> None:
        if wrong:
            got = ", ".join(f"{option} = {_value_at(config, option)!r}" for option in options)
            found.append(Conflict(options, what, got, fix))

    rollout, algo, engine = config.rollout, config.algo, config.engine
    training = config.steps > 0
    refuse(
        rollout.max_new_tokens >= rollout.max_sequence_tokens,
        ("rollout.max_new_tokens", "rollout.max_sequence_tokens"),
        "a reply of full length leaves no room for a prompt",
        "raise max_sequence_tokens above max_new_tokens",
    )
    refuse(
        0 < engine.max_sequence_tokens < rollout.max_sequence_tokens,
        ("engine.max_sequence_tokens", "rollout.max_sequence_tokens"),
        "the engine's sequences are shorter than the rollout's",
        "raise engine.max_sequence_tokens, or leave it out",
    )
    refuse(
        training and rollout.top_k == 1,
        ("rollout.top_k",),
        "one token is left to choose from, so every attempt at a task is alike and its log-probs are 0",
        "set top_k to 2 or more, or to 0 for no limit",
    )
    refuse(
        training and rollout.temperature == 0,
        ("rollout.temperature",),
        "greedy attempts at a task are all alike, so there is nothing to learn from",
        "set a temperature above 0; eval.temperature may stay 0",
    )
    refuse(
        config.eval.attempts > 1 and config.eval.temperature == 0,
        ("eval.attempts", "eval.temperature"),
        "greedy attempts at a task are all alike",
        "set eval.temperature above 0, or eval.attempts = 1",
    )
    refuse(
        any(k > config.eval.attempts for k in config.eval.k),
        ("eval.k", "eval.attempts"),
        "pass@k needs k attempts or more",
        "raise eval.attempts to the largest k; twice that gives a tighter interval",
    )
    refuse(
        training and rollout.group_size < 2 and algo.advantage.id in GROUP_ADVANTAGES,
        ("rollout.group_size", "algo.advantage.id"),
        "this advantage compares the attempts of a group, and a single attempt has none to be compared with",
        "raise rollout.group_size to 2 or more",
    )
    refuse(
        rollout.max_staleness > 0 and engine.id == "embedded" and engine.process == "same",
        ("rollout.max_staleness", "engine.process"),
        "an engine that shares the learner's weights is never behind them",
        'set engine.process = "separate" to give it a copy, or max_staleness = 0',
    )
    refuse(
        rollout.max_staleness > 0 and engine.free_cache == "on",
        ("engine.free_cache", "rollout.max_staleness"),
        "an engine that samples while the learner learns needs its keys and values",
        'set engine.free_cache = "auto" or "off", or max_staleness = 0',
    )
    refuse(
        config.learner.ranks > 1 and ":" in config.device,
        ("device", "learner.ranks"),
        "several learner ranks on one named card",
        'set device = "cuda": rank r takes card r',
    )
    refuse(
        bool(config.learner.distortions) and config.learner.ranks > 1,
        ("learner.distortions", "learner.ranks"),
        "faults are planted in the modules of one process",
        "set learner.ranks = 1",
    )
    refuse(
        0 < rollout.max_staleness < algo.updates_per_batch,
        ("rollout.max_staleness", "algo.updates_per_batch"),
        "one step ahead is updates_per_batch versions behind, which is more than max_staleness allows",
        "raise max_staleness to updates_per_batch or a multiple of it, or set it to 0",
    )
    refuse(
        algo.updates_per_batch > rollout.groups_per_step * rollout.group_size,
        ("algo.updates_per_batch", "rollout.groups_per_step", "rollout.group_size"),
        "more optimizer steps per batch than episodes in it",
        "lower updates_per_batch",
    )
    refuse(
        training and algo.loss.id == "cross_entropy",
        ("algo.loss.id",),
        "cross_entropy imitates demonstrations and ignores rewards",
        "choose a policy loss; demonstrations are learned by warm_start.steps",
    )
    refuse(
        config.eval.every > 0 and config.eval.num_tasks == 0,
        ("eval.every", "eval.num_tasks"),
        "evaluations on no tasks",
        "set eval.num_tasks, or eval.every = 0",
    )
    refuse(
        bool(config.model.path and config.model.tiny.preset),
        ("model.path", "model.tiny.preset"),
        "two models to start from",
        "leave one of them empty",
    )
    lora = config.model.lora
    refuse(
        lora.dropout > 0,
        ("model.lora.dropout",),
        "dropout makes the forward pass random: the policy that learns would not be the one that acted, and the ratio "
        "not 1",
        "set dropout = 0; weight decay and a small rank are what regularizes here",
    )
    refuse(
        lora.rank > 0 and config.model.router.frozen and (not lora.targets or "router" in lora.targets),
        ("model.router.frozen", "model.lora.targets"),
        "an adapter on routers that are to stay as they are",
        "name model.lora.targets without 'router': with an adapter the weights under it never change",
    )
    refuse(
        config.model.router.dtype == "float32" and engine.id == "vllm" and config.model.dtype != "float32",
        ("model.router.dtype", "engine.id"),
        "vLLM computes router logits in the model's own type",
        'set model.router.dtype = "model", or engine.id = "embedded"',
    )
    refuse(
        lora.rank > 0 and algo.kl.coefficient > 0 and config.warm_start.steps > 0,
        ("model.lora.rank", "algo.kl.coefficient", "warm_start.steps"),
        "an adapter's reference is the model with the adapter off, which knows nothing of the warm start",
        "warm up in a run of its own with rank = 0 and start from its weights, or set algo.kl.coefficient = 0",
    )
    for optim, steps in (("optim", "steps"), ("warm_start.optim", "warm_start.steps")):
        total = _value_at(config, steps)
        refuse(
            0 < total < _value_at(config, f"{optim}.warmup_steps"),
            (f"{optim}.warmup_steps", steps),
            "the learning rate would never finish warming up",
            f"lower {optim}.warmup_steps",
        )
    refuse_with_vllm(config, refuse)
    refuse_with_exact(config, refuse)
    return found


def _value_at(config: BaseModel, dotted: str) -> Any:
    value: Any = config
    for name in dotted.split("."):
        value = getattr(value, name)
    return value
