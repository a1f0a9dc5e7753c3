"""`keel rollout`: some episodes before a run: is there a signal to learn from, and what would a step take?

Nothing is guessed that can be measured: the episodes are played by the run's own collector and engine, and the groups
are packed and go through the run's own learner, score and gradient, once and without changing a weight.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.monitor.exhausted import told_if_exhausted
from keel.monitor.live import open_display
from keel.monitor.memory import machine_bytes, resident_bytes
from keel.monitor.progress import Progress
from keel.signal_result import MemoryUse, Projection, RolloutResult, episode_parts, episode_to_show
from keel.types import Group, Trajectory

if TYPE_CHECKING:
    from keel.build import Parts
    from keel.config import ModelConfig, TrainConfig
    from keel.given import ConfigSource
    from keel.rollouts.collector import Collector


def rollout(
    config: ConfigSource,
    *,
    num_tasks: int = 4,
    env: Any = None,
    reward: Any = None,
    with_learner: bool = True,
    warm_start: bool = True,
) -> RolloutResult:
    """Play `rollout.group_size` attempts at each of `num_tasks` training tasks, and judge what there is to learn.

    `env` and `reward` stand in for the config's, as in `keel.train`. The policy is the one that reinforcement begins
    with: a warm start that the config asks for is gone through first, unless `warm_start` is False. `with_learner`
    packs the groups and runs them through the learner once, without applying anything; without it there is no warm
    start and no optimizer, and a model fits that can only be sampled from. Nothing is kept but the result.

    Raises ConfigError, and ValueError for less than one task; failing episodes are part of the result.
    """
    if num_tasks < 1:
        raise ValueError(f"rollout: num_tasks got {num_tasks}; needs at least 1")
    from keel.given import configured

    with configured(config, env=env, reward=reward) as checked:
        return _measure(checked, num_tasks, with_learner=with_learner, warm_start=with_learner and warm_start)


def _measure(config: TrainConfig, num_tasks: int, *, with_learner: bool, warm_start: bool) -> RolloutResult:
    from keel.build import prepare, starting_model
    from keel.chat.tokenizer import as_chat_tokenizer, load_tokenizer
    from keel.device import describe_device, resolve_device
    from keel.plan import make_plan

    factory = prepare(config, None)
    before = resident_bytes()
    device, progress = resolve_device(config.device), Progress()
    with tempfile.TemporaryDirectory(prefix="keel-rollout-") as root, told_if_exhausted(config, progress):
        model = starting_model(config, factory, Path(root))
        started = _started_from(config, model)
        plan = make_plan(started)
        check = _for_check(started, num_tasks, warm_start=warm_start)
        learned: dict[str, float] = {}
        with _parts(check, with_learner) as (collector, parts):
            if parts is not None:
                _warm_up(check, parts, progress)
            progress.enter("collect")
            groups, metrics, notes = _collect(collector, num_tasks)
            if parts is not None and any(group.kept for group in groups):
                learned = _learn(check, parts, groups, progress)
        tokenizer = as_chat_tokenizer(load_tokenizer(model.path, revision=model.revision))
        shown = episode_to_show(groups)
        card_peak, card = _card_memory(device)
        return RolloutResult(
            groups=tuple(groups),
            metrics={**metrics, **learned},
            projection=_project(config, num_tasks, metrics, learned),
            memory=MemoryUse(plan.peak_bytes, before, _peak_bytes(), machine_bytes(), card_peak, card),
            shown=shown,
            episode=episode_parts(shown, tokenizer.decode),
            device=describe_device(device),
            notes=(*_notes(config, num_tasks, warm_start=warm_start), *notes),
        )


def _started_from(config: TrainConfig, model: ModelConfig) -> TrainConfig:
    """`config` with the model at hand: a tiny one has been built by now."""
    tiny = model.tiny.model_copy(update={"preset": ""})
    return config.model_copy(update={"model": model.model_copy(update={"tiny": tiny})})


def _for_check(config: TrainConfig, num_tasks: int, *, warm_start: bool) -> TrainConfig:
    """`config` for one step of `num_tasks` groups, with nothing in the background and all checks on."""
    return config.model_copy(
        update={
            "steps": max(1, config.steps),
            "rollout": config.rollout.model_copy(update={"groups_per_step": num_tasks, "max_staleness": 0}),
            "warm_start": config.warm_start if warm_start else config.warm_start.model_copy(update={"steps": 0}),
            "learner": config.learner.model_copy(update={"recompute_every": 1}),
        }
    )


@contextlib.contextmanager
def _parts(config: TrainConfig, with_learner: bool) -> Iterator[tuple[Collector, Parts | None]]:
    from keel.build import assemble, build_sampler, prepare

    if not with_learner:
        with build_sampler(config, None) as collector:
            yield collector, None
        return
    with assemble(config, prepare(config, None), config.model) as parts:
        yield parts.collector, parts


def _warm_up(config: TrainConfig, parts: Parts, progress: Progress) -> None:
    """Take the steps before reinforcement, as `keel train` takes them, and give the engine the weights."""
    from keel.loop import prepare_batch, take_updates

    for stage in config.stages()[:-1]:
        source = parts.sources[stage.name]
        display = open_display(config.log.live, "keel rollout")
        with contextlib.closing(display):
            display.begin(stage.name, stage.num_steps)
            for step in range(stage.num_steps):
                parts.learner.enter(stage)
                batch = prepare_batch(config, parts.learner, stage, source.next_groups(step), progress)
                updates, _, _ = take_updates(parts.learner, parts.monitor, batch, progress)
                display.step(stage.name, step, updates[-1].metrics)
    parts.publish()


def _collect(collector: Collector, num_tasks: int) -> tuple[list[Group], dict[str, float], list[str]]:
    """The groups, also if every episode failed, with their metrics and what is to be said about the tasks."""
    from keel.rollouts.collector import RolloutError
    from keel.rollouts.metrics import rollout_metrics

    available = len(collector.tasks("train"))
    notes = []
    if available < num_tasks:
        notes.append(f"the environment has {available} training task(s) only; some were played more than once")
    began = time.perf_counter()
    try:
        groups = collector.next_groups(0)
        return groups, dict(collector.metrics), notes
    except RolloutError as error:
        groups = _grouped(error.trajectories)
        return groups, rollout_metrics(groups, time.perf_counter() - began), notes


def _grouped(trajectories: Sequence[Trajectory]) -> list[Group]:
    members: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        members.setdefault(trajectory.group_id, []).append(trajectory)
    return [Group(name, found[0].task, tuple(found)) for name, found in members.items()]


def _learn(config: TrainConfig, parts: Parts, groups: Sequence[Group], progress: Progress) -> dict[str, float]:
    """Metrics of the learner's work on the groups, as a training step does it, without its optimizer steps."""
    from keel.loop import mean_metrics, prepare_batch

    stage = config.stages()[-1]
    parts.learner.enter(stage)
    parts.make_room()
    began = time.perf_counter()
    batch = prepare_batch(config, parts.learner, stage, groups, progress)
    progress.enter("backward")
    updates = [parts.learner.backward(batch, index) for index in range(batch.num_updates)]
    return {**mean_metrics(updates), "time/learn_s": time.perf_counter() - began}


def _project(config: TrainConfig, num_tasks: int, metrics: dict[str, float], learned: dict[str, float]) -> Projection:
    """What was measured on `num_tasks` groups, for `groups_per_step` of them: work grows with their number."""
    scale = config.rollout.groups_per_step / num_tasks
    learn_s = learned.get("time/learn_s")
    return Projection(
        rollout_s=scale * metrics["time/rollout_s"],
        learn_s=None if learn_s is None else scale * learn_s,
        overlapping=config.rollout.max_staleness > 0,
        steps=config.steps,
    )


def _notes(config: TrainConfig, num_tasks: int, *, warm_start: bool) -> list[str]:
    notes = []
    if config.warm_start.steps:
        when = "after" if warm_start else "before, or without,"
        notes.append(f"the policy is the one {when} the {config.warm_start.steps} steps of warm start")
    if config.learner.ranks > 1 or config.engine.process == "separate":
        notes.append("what was held is of this process alone, without those of the engine and the learner's ranks")
    episodes, slots = num_tasks * config.rollout.group_size, config.engine.slots
    if episodes < slots and num_tasks < config.rollout.groups_per_step:
        notes.append(
            f"{episodes} episodes do not fill the engine's {slots} slots: a step is somewhat faster than projected"
        )
    return notes


def _peak_bytes() -> int:
    """The most memory that this process has held since it began."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _card_memory(device: Any) -> tuple[int | None, int | None]:
    """Peak of torch's allocations on the card and the card's memory; None without one."""
    if device.type != "cuda":
        return None, None
    import torch

    return torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
