"""The loop. It shows the order of things and nothing else: a mode is a value, never a branch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from keel import plugins
from keel.algo.apply import add_advantages, correct, set_reduction
from keel.batch import PackedBatch, pack
from keel.build import EnvSource, Parts, build, check_start, with_absolute_model
from keel.config import AlgoConfig, Stage, TrainConfig
from keel.evaluation import held_out_alarm, measure_tasks
from keel.learner.base import LearnerLike, Update
from keel.learner.gradient import bound_corrections
from keel.monitor.exhausted import told_if_exhausted
from keel.monitor.progress import Watch
from keel.monitor.rules import Monitor
from keel.monitor.runlog import RunLog
from keel.monitor.summary import RunSummary, completed_run
from keel.performance import performance
from keel.records import largest_sizes, write_records
from keel.report.live import complete_report
from keel.types import Group, Verdict

logger = logging.getLogger(__name__)


def train(config: TrainConfig, env: EnvSource | None = None) -> RunSummary:
    """Train as `config` says, in a new run directory; `env` stands in for the config's environment.

    Raises ConfigError (no such device, no model that can be trained) and RunDirectoryError before anything is written,
    PluginError for a plug-in that does not exist, and what stops a run: RolloutError if every episode of a step failed,
    LearnerError if a learner's process is gone, MemoryExhaustedError. Interrupted (Ctrl-C, SIGTERM), it finishes its
    step, saves and raises RunInterruptedError.
    """
    config = with_absolute_model(config)
    check_start(config)
    with RunLog.open(config) as run, told_if_exhausted(config, run.progress), build(config, env, run) as parts:
        return run_stages(config, run, parts)


def resume(run_dir: str | Path, env: EnvSource | None = None) -> RunSummary:
    """Continue the run in `run_dir` from its newest whole checkpoint, or from its beginning if there is none.

    A completed run is left as it is, and so is one that the monitor stopped; the summary says so. Raises
    RunDirectoryError if `run_dir` is no run or another process holds it, CheckpointError if no checkpoint is whole.
    """
    completed = completed_run(Path(run_dir))
    if completed is not None:
        complete_report(Path(run_dir), tell=logger.warning)
        return completed
    with (
        RunLog.resume(Path(run_dir)) as run,
        told_if_exhausted(run.config, run.progress),
        build(run.config, env, run) as parts,
    ):
        parts.restore(run)
        verdict = parts.monitor.standing()
        if verdict.stops:
            return run.close("stopped", verdict.reason)
        return run_stages(run.config, run, parts)


def run_stages(config: TrainConfig, run: RunLog, parts: Parts) -> RunSummary:
    """All steps that are left, of all stages, with the evaluations between them."""
    parts.publish()
    if parts.learner.step == 0:
        measure(config, run, parts, "initial")
        look_at_held_out(config, run, parts)
    for stage in config.stages():
        with run.stage(stage.name, stage.num_steps):
            for step in range(parts.learner.step - stage.first_step, stage.num_steps):
                verdict = train_step(config, run, parts, stage, step)
                verdict = close_step(config, run, parts, stage, step + 1, verdict)
                if verdict.stops:
                    return run.end(verdict)
    return run.close()


def train_step(config: TrainConfig, run: RunLog, parts: Parts, stage: Stage, step: int) -> Verdict:
    """From groups to new weights in the engine: step number `step` of `stage`."""
    watch = parts.watch(run.progress, stage, step)
    learner, source = parts.learner, parts.sources[stage.name]
    learner.enter(stage)
    watch.enter("collect")
    groups = source.next_groups(step)
    parts.make_room()

    batch = prepare_batch(config, learner, stage, groups, watch)
    updates, stats, verdict = take_updates(learner, parts.monitor, batch, watch)

    watch.enter("publish")
    published = parts.publish()
    watch.enter("record")
    write_records(run, config, stage, step, groups, batch, updates)
    gap = parts.consistency.look(step, batch, updates)
    row = {**source.metrics, **mean_metrics(updates), **gap.metrics, **stats, **published, **watch.figures()}
    run.log_step(step, {**row, **performance(row, config, parts.peak)}, stage=stage.name)
    run.log_worst_tokens(gap.rows(), step=step, stage=stage.name)
    for alarm in parts.monitor.watch(stage.name, step, row):
        run.log_alarm(alarm, step=step, stage=stage.name)
    return verdict


def prepare_batch(
    config: TrainConfig, learner: LearnerLike, stage: Stage, groups: Sequence[Group], watch: Watch
) -> PackedBatch:
    """The groups as a step's updates learn from them: packed, scored, corrected, with advantages."""
    watch.enter("pack")
    batch = pack(groups, max_tokens=config.batch.max_tokens, num_updates=stage.algo.updates_per_batch)
    watch.enter("score", **largest_sizes(batch))
    batch = learner.score(batch)
    batch = correct(batch, bound_corrections(stage.algo))
    return with_advantages(batch, stage.algo)


def take_updates(
    learner: LearnerLike, monitor: Monitor, batch: PackedBatch, watch: Watch
) -> tuple[list[Update], dict[str, float], Verdict]:
    """The updates of a batch, each judged and then applied or not; what applying them told, and the worst verdict.

    After a stop the others are skipped unjudged: the monitor, and so the checkpoint, keeps the stop.
    """
    updates, verdict, stats = list[Update](), Verdict("go"), list[dict[str, float]]()
    for index in range(batch.num_updates):
        watch.enter("backward")
        update = learner.backward(batch, index)
        judged = AFTER_STOP if verdict.stops else monitor.judge(update)
        watch.enter("optimizer")
        stats.append(learner.apply(update, judged))
        updates.append(update)
        verdict = max(verdict, judged, key=lambda each: SEVERITY.index(each.action))
    merged = {name: value for each in stats for name, value in each.items()}  # the last update's
    merged |= {name: sum(each[name] for each in stats) for name in ("policy/skipped",) if stats}
    merged |= {name: min(each[name] for each in stats) for name in ("policy/clip_factor",) if stats}
    return updates, merged, verdict


def close_step(config: TrainConfig, run: RunLog, parts: Parts, stage: Stage, done: int, verdict: Verdict) -> Verdict:
    """What follows `done` steps of `stage`: an evaluation, then a checkpoint that knows of it, each if it is due.

    Returns whether the run goes on, the user's wish included: then too there is a checkpoint, and nothing is lost.
    """
    ends = done == stage.num_steps or verdict.stops
    if ends or due(done, stage.eval_every):
        measure(config, run, parts, stage.closing_evaluation if ends else f"step_{done}")
    asked = run.asked_to_stop()
    if ends or asked.stops or due(done, config.checkpoint.every):
        run.progress.enter("save")
        parts.save(run, config.checkpoint.keep)
        asked = run.asked_to_stop()
    return verdict if verdict.stops else asked


def measure(config: TrainConfig, run: RunLog, parts: Parts, name: str) -> None:
    """Evaluate and log under `name`, unless there are no tasks for it."""
    if config.eval.num_tasks == 0:
        return
    run.progress.enter("evaluate")
    with run.stage("eval", 1):
        run.log_eval(name, measure_tasks(parts.collector, config.eval).metrics, step=parts.learner.step)


def look_at_held_out(config: TrainConfig, run: RunLog, parts: Parts) -> None:
    """Say so if the evaluation asks tasks that are trained on."""
    if config.eval.num_tasks:
        alarm = held_out_alarm(parts.collector, config.eval)
        if alarm is not None:
            run.log_alarm(alarm, step=0, stage=config.stages()[0].name)


def with_advantages(batch: PackedBatch, algo: AlgoConfig) -> PackedBatch:
    """Advantages of what the correction left, and what the update's loss will be divided by."""
    function = plugins.resolve(algo.advantage.id, "keel.algo.advantage")
    batch = add_advantages(
        batch,
        function,
        algo.advantage.options,
        rejected_in_baseline=algo.rejected_in_baseline,
        whiten=algo.whiten_advantages,
    )
    reduction = plugins.resolve(algo.reduction.id, "keel.algo.reduction")
    return set_reduction(batch, reduction, algo.reduction.options)


def due(done: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after `done` of them."""
    return every > 0 and done % every == 0


SEVERITY = ("go", "skip", "stop")
AFTER_STOP = Verdict("skip", "an earlier update of the same batch stopped the run")
COUNTS = (
    "policy/loss_tokens",
    "learner/tokens",
    "learner/tflop",
    "learner/shared_tokens",
    "mismatch/outliers",
    "mismatch/outliers_routed",
    "mismatch/outliers_near_tie",
)
WORST = ("_max", "_max_dev", "/staleness")


def mean_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """One row of several updates: counts are summed, maxima are the worst, all else is a mean over loss tokens."""
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for update in updates for name in update.metrics):
        values = [(update.metrics[name], update.num_loss_tokens) for update in updates if name in update.metrics]
        tokens = sum(weight for _, weight in values)
        if name in COUNTS:
            merged[name] = sum(value for value, _ in values)
        elif name.endswith(WORST):
            merged[name] = max(value for value, _ in values)
        elif len(values) == 1 or tokens == 0:
            merged[name] = values[-1][0]
        else:
            merged[name] = sum(value * weight for value, weight in values) / tokens
    return merged
