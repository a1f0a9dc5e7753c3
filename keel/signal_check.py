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

from keel.monitor.memory import machine_bytes, resident_bytes
from keel.signal_result import MemoryUse, Projection, RolloutResult, episode_parts, episode_to_show
from keel.types import Group, Trajectory

if TYPE_CHECKING:
    from keel.build import Parts
    from keel.config import ModelConfig, TrainConfig
    from keel.given import ConfigSource
    from keel.rollouts.collector import Collector


def rollout(
    config: ConfigSource, *, num_tasks: int = 4, env: Any = None, reward: Any = None, with_learner: bool = True
) -> RolloutResult:
    """Play `rollout.group_size` attempts at each of `num_tasks` training tasks, and judge what there is to learn.

    `env` and `reward` stand in for the config's, as in `keel.train`. `with_learner` packs the groups and runs them
    through the learner once, without applying anything; without it no optimizer is made, and a model fits that can
    only be sampled from. The policy is the one at the start: no warm start has happened. Raises ConfigError, and
    ValueError for less than one task; failing episodes are part of the result.
    """
    if num_tasks < 1:
        raise ValueError(f"rollout: num_tasks got {num_tasks}; needs at least 1")
    from keel.given import configured

    with configured(config, env=env, reward=reward) as checked:
        return _measure(checked, num_tasks, with_learner)


def _measure(config: TrainConfig, num_tasks: int, with_learner: bool) -> RolloutResult:
    from keel.build import prepare, starting_model
    from keel.chat.tokenizer import as_chat_tokenizer, load_tokenizer
    from keel.device import describe_device, resolve_device
    from keel.plan import make_plan

    factory = prepare(config, None)
    before = resident_bytes()
    device = resolve_device(config.device)
    with tempfile.TemporaryDirectory(prefix="keel-rollout-") as root:
        model = starting_model(config, factory, Path(root))
        started = _started_from(config, model)
        plan = make_plan(started)
        learned: dict[str, float] = {}
        with _parts(_for_check(started, num_tasks), with_learner) as (collector, parts):
            groups, metrics, notes = _collect(collector, num_tasks)
            if parts is not None and any(group.kept for group in groups):
                learned = _learn(_for_check(started, num_tasks), parts, groups)
        tokenizer = as_chat_tokenizer(load_tokenizer(model.path, revision=model.revision))
        shown = episode_to_show(groups)
        card_peak, card = _card_memory(device)
        return RolloutResult(
            groups=tuple(groups),
            metrics={**metrics, **learned},
            projection=_project(config, num_tasks, metrics, learned),
            memory=MemoryUse(plan.memory.total, before, _peak_bytes(), machine_bytes(), card_peak, card),
            shown=shown,
            episode=episode_parts(shown, tokenizer.decode),
            device=describe_device(device),
            notes=(*_notes(config, num_tasks), *notes),
        )


def _started_from(config: TrainConfig, model: ModelConfig) -> TrainConfig:
    """`config` with the model at hand: a tiny one has been built by now."""
    tiny = model.tiny.model_copy(update={"preset": ""})
    return config.model_copy(update={"model": model.model_copy(update={"tiny": tiny})})


def _for_check(config: TrainConfig, num_tasks: int) -> TrainConfig:
    """`config` for one step of `num_tasks` groups: no stage before it, nothing in the background, all checks on."""
    return config.model_copy(
        update={
            "steps": max(1, config.steps),
            "rollout": config.rollout.model_copy(update={"groups_per_step": num_tasks, "max_staleness": 0}),
            "warm_start": config.warm_start.model_copy(update={"steps": 0}),
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
        parts.publish()
        yield parts.collector, parts


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


def _learn(config: TrainConfig, parts: Parts, groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of the learner's work on the groups, as a training step does it, without its optimizer steps."""
    from keel.batch import pack
    from keel.loop import corrected, mean_metrics, with_advantages

    (stage,) = config.stages()
    parts.learner.enter(stage)
    began = time.perf_counter()
    batch = pack(groups, max_tokens=config.batch.max_tokens, num_updates=stage.algo.updates_per_batch)
    batch = parts.learner.score(batch)
    batch = corrected(batch, stage.algo)
    batch = with_advantages(batch, stage.algo)
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


def _notes(config: TrainConfig, num_tasks: int) -> list[str]:
    notes = []
    if config.warm_start.steps:
        notes.append(
            f"this is the policy before its {config.warm_start.steps} steps of warm start; to judge the one after, "
            "give a checkpoint's weights: keel rollout RUN.toml --model runs/.../checkpoints/<step>/weights"
        )
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
