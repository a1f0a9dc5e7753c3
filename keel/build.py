"""From a config to the parts of a run: who learns, who samples, where groups come from, who judges.

One process or many is decided here and nowhere else: the loop sees the same methods either way.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from keel import plugins
from keel.chat.base import Chat
from keel.chat.factory import make_chat
from keel.chat.tokenizer import load_tokenizer
from keel.config import EngineConfig, EnvConfig, ModelConfig, Stage, TinyConfig, TrainConfig
from keel.device import (
    MemoryWatch,
    describe_device,
    frees_cache,
    prepare_device,
    rank_devices,
    resolve_device,
)
from keel.distortion import describe_planted, planted_metrics
from keel.engine_checks import check_engine, check_resumed, identity_of_model
from keel.engines.base import Engine
from keel.engines.distorted import distort_engine, undistorted
from keel.engines.embedded.engine import EmbeddedEngine
from keel.engines.embedded.load import load_policy
from keel.engines.identity import ModelIdentity
from keel.engines.process import EngineProcess
from keel.envs.base import Env
from keel.envs.load import EnvFactory, env_factory
from keel.gap.consistency import Consistency
from keel.learner.base import LearnerLike
from keel.learner.checkpoint import checkpoint_to_resume, prune
from keel.learner.group import LearnerGroup
from keel.learner.learner import Learner
from keel.monitor.apart import EngineApart
from keel.monitor.bands import MISMATCH, bands
from keel.monitor.planted import PlantedFaults
from keel.monitor.progress import ChildProcess, Progress, Watched
from keel.monitor.rules import Monitor, make_monitor
from keel.ops.numerics import deterministic_algorithms
from keel.performance import UNKNOWN_PEAK, Peak, peak_of
from keel.plan import describe_start, make_plan, read_model_config
from keel.report.live import LiveReport
from keel.rewards.base import Reward
from keel.rollouts.collector import Collector
from keel.rollouts.demonstrate import DemonstrationSource
from keel.rollouts.loop_thread import LoopThread
from keel.sources import save_sources
from keel.step_watch import StepWatch
from keel.sync.publisher import Publisher
from keel.tiny_start import build_tiny_start, named_demonstrations
from keel.types import Group

if TYPE_CHECKING:
    from keel.monitor.runlog import RunLog

EnvSource = Callable[[], Env]
"""Makes one more environment; a class, or a function without arguments."""


class GroupSource(Protocol):
    """Where a stage's groups come from; its state is part of a checkpoint."""

    def next_groups(self, step: int) -> list[Group]: ...

    @property
    def metrics(self) -> Mapping[str, float]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run. `sources` are by stage; all state that a checkpoint must hold is reached from here."""

    learner: LearnerLike
    engine: Engine
    collector: Collector
    sources: Mapping[str, GroupSource]
    monitor: Monitor
    consistency: Consistency
    publisher: Publisher
    loop: LoopThread
    device: torch.device
    frees_cache: bool = False  # whether the engine gives its keys and values back while the learner learns
    planted: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of faults on purpose, for every row
    identity: ModelIdentity | None = None  # of the model's files, without its weights
    peak: Peak = UNKNOWN_PEAK  # what `perf/mfu` is a share of

    def watch(self, progress: Progress, stage: Stage, step: int) -> StepWatch:
        """A step begins, and is watched from now on."""
        progress.begin(stage.name, step, stage.num_steps)
        memory = MemoryWatch(self.device, self.engine.capabilities().cache_bytes)
        return StepWatch(progress, memory, self.planted)

    def make_room(self) -> None:
        """Nobody samples until the next publish: the learner may have the memory."""
        if self.frees_cache:
            self.loop.run(self.engine.release_memory())

    def watched(self) -> Watched:
        """What the watchdog asks while the run goes on."""
        return Watched(self._counts, self.collector.activity.waiting, self._processes)

    def _counts(self) -> tuple[int, ...]:
        counts = [self.collector.activity.moves]
        if isinstance(self.learner, Learner):
            counts.append(self.learner.micro_batches)
        engine = undistorted(self.engine)
        if isinstance(engine, EmbeddedEngine):
            counts.extend(engine.statistics().values())
        return tuple(counts)

    def _processes(self) -> list[ChildProcess]:
        engine = undistorted(self.engine)
        found = [("engine", engine.pid, engine.stacks)] if isinstance(engine, EngineProcess) else []
        ranks = self.learner.processes if isinstance(self.learner, LearnerGroup) else []
        return [ChildProcess(*each) for each in (*found, *ranks)]

    def publish(self) -> dict[str, float]:
        """Give the engine the learner's weights under the learner's version; what a check that was due measured.

        Raises StaleWeightsError if it says that they did not arrive.
        """
        return self.publisher.publish(self.learner, self.engine)

    def save(self, run: RunLog, keep: int) -> None:
        """A checkpoint of everything after `learner.step` steps; older ones beyond `keep` go."""
        extra = {
            "run": run.state(),
            "monitor": self.monitor.state(),
            "sources": {name: source.state() for name, source in self.sources.items()},
            "identity": None if self.identity is None else self.identity.to_json(),
        }
        self.learner.save(run.paths.checkpoint(f"{self.learner.step:06d}"), extra)
        prune(run.paths.checkpoints, keep)

    def restore(self, run: RunLog) -> None:
        """Continue from the newest whole checkpoint, or from the beginning if there is none yet."""
        path = checkpoint_to_resume(run.paths.checkpoints)
        if path is None:
            run.restore(None)
            return
        extra = self.learner.load(path)
        if extra.get("identity") and self.identity is not None:
            check_resumed(ModelIdentity.from_json(extra["identity"]), self.identity)
        run.restore(extra["run"])
        self.monitor.restore(extra["monitor"])
        for name, source in self.sources.items():
            if name in extra["sources"]:
                source.restore(extra["sources"][name])
            else:  # the run had no such stage when the checkpoint was written
                run.note(f"the checkpoint {path.name} knows no {name} stage: its groups begin with the first task")


def check_start(config: TrainConfig) -> None:
    """Raise ConfigError for a device that is not there and a model that cannot be read, before a run directory is made.

    Of the model only its config.json is read.
    """
    rank_devices(config.device, config.learner.ranks)
    read_model_config(config.model)


@contextmanager
def build(config: TrainConfig, env: EnvSource | None, run: RunLog) -> Iterator[Parts]:
    """The parts of `config`, closed again in the end whatever happens. `env` stands in for the config's `[env]`."""
    run.add_tracker(LiveReport(run.paths.root, config.report, tell=run.note))
    factory = prepare(config, env)
    model = starting_model(config, factory, run.paths.root)
    save_sources(config, run.paths.root / "sources")
    device = describe_device(resolve_device(config.device))
    run.note_environment(threads=torch.get_num_threads(), device=device, peak=dataclasses.asdict(peak_of(config)))
    run.note(describe_start(make_plan(config)))
    if told := describe_planted(config.engine.distortions, config.learner.distortions):
        run.note(f"warning: {told}")
    with assemble(config, factory, model, logs=run.paths.root) as parts, run.progress.watching(parts.watched()):
        yield parts


@contextmanager
def assemble(
    config: TrainConfig, factory: EnvFactory, model: ModelConfig, *, logs: Path | None = None
) -> Iterator[Parts]:
    """The parts of `config` around the model of `model.path`, without a run directory; closed again in the end."""
    tokenizer = load_tokenizer(model.path, revision=model.revision)
    chat = make_chat(config.chat, tokenizer)
    with ExitStack() as stack:
        stack.enter_context(deterministic_algorithms(config.numerics == "exact"))
        learner = make_learner(config, model)
        stack.callback(learner.close)
        loop = LoopThread()
        stack.callback(loop.close)
        engine = make_engine(config, model, learner, logs=logs)
        stack.callback(lambda: loop.run(engine.close()))
        identity = identity_of_model(model)
        check_engine(config, engine.capabilities(), identity)
        collector = Collector(
            engine,
            factory,
            chat,
            config.rollout,
            config.env,
            seed=config.seed,
            num_steps=config.steps,
            updates_per_batch=config.algo.updates_per_batch,
            reward=make_reward(config.env),
            loop=loop,
        )
        stack.callback(collector.close)
        sources = make_sources(config, factory, chat, collector)
        for source in sources.values():
            stack.callback(source.close)
        device = resolve_device(config.device)
        frees = frees_cache(config, device)
        publisher = make_publisher(config, model, loop)
        planted = planted_metrics(config.engine.distortions, config.learner.distortions)
        monitor = make_monitor(config.monitor, [EngineApart(bands(config)[MISMATCH]), PlantedFaults()])
        consistency = Consistency(config.monitor, tokenizer.decode)
        told = (frees, planted, identity, peak_of(config))
        yield Parts(learner, engine, collector, sources, monitor, consistency, publisher, loop, device, *told)


@contextmanager
def build_sampler(config: TrainConfig, env: EnvSource | None) -> Iterator[Collector]:
    """A collector over an engine on the weights of `config.model`, without a learner: all that an evaluation needs.

    `model.path` is any Hugging Face directory or hub id, a checkpoint's `weights` among them; a tiny preset is built in
    a temporary directory.
    """
    factory = prepare(config, env)
    with ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory(prefix="keel-sampler-"))
        model = starting_model(config, factory, Path(root))
        chat = make_chat(config.chat, load_tokenizer(model.path, revision=model.revision))
        loop = LoopThread()
        stack.callback(loop.close)
        engine = make_engine(config, model, learner=None)
        stack.callback(lambda: loop.run(engine.close()))
        reward = make_reward(config.env)
        collector = Collector(
            engine, factory, chat, config.rollout, config.env, seed=config.seed, reward=reward, loop=loop
        )
        stack.callback(collector.close)
        yield collector


def prepare(config: TrainConfig, env: EnvSource | None) -> EnvFactory:
    """Set the number of threads and the device up, before any torch work, and say where environments come from.

    Raises ConfigError for a device that is not there.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    prepare_device(resolve_device(config.device))
    return env if env is not None else env_factory(config.env)


def starting_model(config: TrainConfig, factory: EnvFactory, root: Path) -> ModelConfig:
    """The `[model]` section with a `path` that can be loaded; a tiny model is built below the run directory, once."""
    if not config.model.tiny.preset:
        read_model_config(config.model)  # told in words if it cannot be read
        return config.model
    path = root / "model"
    if not path.exists():
        unfinished = root / "model.tmp"
        build_tiny_start(config, factory, unfinished)
        unfinished.replace(path)
    return config.model.model_copy(update={"path": str(path)})


def with_absolute_model(config: TrainConfig) -> TrainConfig:
    """The config with a `model.path` that is a directory made absolute, so that a run resumes from anywhere."""
    path = Path(config.model.path)
    if not config.model.path or not path.is_dir():
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(path.resolve())})})


def make_learner(config: TrainConfig, model: ModelConfig) -> LearnerLike:
    """One process, or a group of ranks behind the same methods."""
    devices = rank_devices(config.device, config.learner.ranks)
    if config.learner.ranks == 1:
        return Learner(model, config.learner, seed=config.seed, device=devices[0], numerics=config.numerics)
    return LearnerGroup(model, config.learner, seed=config.seed, devices=devices)


def make_engine(
    config: TrainConfig, model: ModelConfig, learner: LearnerLike | None, *, logs: Path | None = None
) -> Engine:
    """The engine of `config`, with the faults of `engine.distortions` planted in it, if there are any."""
    if not config.engine.distortions:
        return _plain_engine(config, model, learner, logs)

    def make(path: Path) -> Engine:
        return _plain_engine(config, model.model_copy(update={"path": str(path), "revision": ""}), learner, logs)

    return distort_engine(make, model.path, config.engine.distortions)


def _plain_engine(config: TrainConfig, model: ModelConfig, learner: LearnerLike | None, logs: Path | None) -> Engine:
    """The engine of `config` on the weights of `model`.

    An embedded one in the process of a learner with one rank samples from the learner's own modules. Any other has
    weights of its own, those of `model.path` until they are published to; without a learner they stay.
    """
    engine: EngineConfig = config.engine
    limit = config.rollout.max_sequence_tokens
    if engine.id == "vllm":
        from keel.engines.vllm.engine import VllmEngine

        version = 0 if learner is None else learner.version
        log_path = None if logs is None else logs / "vllm.log"
        return VllmEngine(model, engine, max_sequence_tokens=limit, version=version, log_path=log_path)
    if engine.id != "embedded":
        made: Engine = plugins.resolve(engine.id, "keel.engines")(model, engine, max_sequence_tokens=limit)
        return made
    version = 0 if learner is None else learner.version
    device = resolve_device(config.device)
    if engine.process == "separate":
        # The number in force here, set or torch's own choice: other threads, other bits.
        num_threads = torch.get_num_threads()
        return EngineProcess(
            model,
            engine,
            max_sequence_tokens=limit,
            version=version,
            num_threads=num_threads,
            device=str(device),
            numerics=config.numerics,
        )
    # In shared modules a fault of one side would be the other's as well.
    shares = not (config.engine.distortions or config.learner.distortions)
    if isinstance(learner, Learner) and shares:
        return EmbeddedEngine(learner.policy, engine, max_sequence_tokens=limit, version=version)
    policy = load_policy(model, device, config.numerics)
    return EmbeddedEngine(policy, engine, max_sequence_tokens=limit, version=version, shares_weights=False)


def make_publisher(config: TrainConfig, model: ModelConfig, loop: LoopThread) -> Publisher:
    """How the learner's weights of `model` reach the engine, and when it is checked that they did."""
    built = model.model_copy(update={"tiny": TinyConfig()})  # a tiny model may have got fewer tokens than it asked for
    info = read_model_config(built)[1]
    attached = config.engine.id == "vllm" and bool(config.engine.vllm.url)
    return Publisher(
        config.sync,
        run=loop.run,
        dtype=model.dtype,
        vocab_size=info.vocab_size,
        window=max((window or 0 for window in info.layer_windows), default=0),
        attached=attached,
        may_perturb=not attached or config.engine.vllm.allow_weight_push,
    )


def make_reward(config: EnvConfig) -> Reward | None:
    """What is added to the environment's own reward; None if nothing is."""
    if config.reward.id == "none":
        return None
    function = plugins.resolve(config.reward.id, "keel.rewards")
    plugins.check_options(function, config.reward.options, f"reward {config.reward.id!r}")
    made: Reward = functools.partial(function, **config.reward.options)
    return made


def make_sources(config: TrainConfig, factory: EnvFactory, chat: Chat, collector: Collector) -> dict[str, GroupSource]:
    """Where each stage's groups come from."""
    makers: dict[str, Callable[[], GroupSource]] = {
        "warm_start": functools.partial(_demonstrations, config, factory, chat),
        "reinforcement": lambda: collector,
    }
    return {stage.name: makers[stage.name]() for stage in config.stages()}


def _demonstrations(config: TrainConfig, factory: EnvFactory, chat: Chat) -> GroupSource:
    per_step = config.warm_start.demonstrations_per_step
    own = named_demonstrations(config.warm_start)
    return DemonstrationSource(factory, chat, per_step=per_step, seed=config.seed, demonstrations=own)
