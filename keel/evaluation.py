"""Evaluation on held-out tasks: one or several attempts at each, with the same draws every time."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keel
from keel import config_load
from keel.config_recipes import recipe_text
from keel.config_schema import toml_value
from keel.envs.rows import BadRowError, canonical
from keel.evaluation_result import EvaluationResult, summarize
from keel.given import ConfigSource, configured, read_config
from keel.monitor.rows import write_json
from keel.monitor.rules import Alarm
from keel.rollouts.store import write_trajectories
from keel.runs import Run, load_run
from keel.secrecy import refuse_secrets, scrubbed_values
from keel.types import Task, Trajectory, UserFault

if TYPE_CHECKING:
    from keel.config import EvalConfig, TrainConfig
    from keel.rollouts.collector import Collector

NEEDED = ("model.path|model.tiny.preset", "env.id", "eval.num_tasks")
MODEL_FILES = ("config.json", "adapter_config.json")
LOOKED_AT = 4096
RECORDED_SECTIONS = ("model", "chat", "env", "rollout", "engine", "eval")


class EvaluationError(UserFault, ValueError):
    """The evaluation asked for cannot be had; says what, got and how to fix."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What is evaluated: a config whose model it is, and the run and the checkpoint that it comes from, if it does."""

    config: TrainConfig
    run: Path | None = None
    checkpoint: str = ""


def evaluate(  # noqa: PLR0913 (a knob each, and all but the first by name)
    source: ConfigSource | Run,
    *,
    env: Any = None,
    reward: Any = None,
    model: str | os.PathLike[str] | None = None,
    checkpoint: int | str | None = None,
    num_tasks: int | None = None,
    attempts: int | None = None,
    k: Sequence[int] | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    sets: Sequence[str] = (),
    json_file: str | os.PathLike[str] | None = None,
    save: str | os.PathLike[str] | None = None,
    record: bool = False,
) -> EvaluationResult:
    """Play the first `num_tasks` held-out tasks, `attempts` times each, and tell how well it went.

    `source` is a config (a TrainConfig, a TOML file or a recipe's name, a mapping), a run (`keel.load_run`, or its
    directory), or a model (a Hugging Face directory or hub id). Of a run the newest checkpoint is evaluated, or
    `checkpoint` (training steps done, or "latest"), on the run's own held-out tasks; `model` evaluates other weights
    instead. `env` and `reward` stand in for the config's, as in `keel.train`; a bare model needs `env`. The other
    options stand in for `[eval]`; `sets` are "section.option=value", as on the command line.

    `json_file` is written with figures, config and outcomes; `save` is a directory for the trajectories, tokens
    included; `record` puts the same JSON into the run's `evaluations/`, where its report shows it.

    Raises EvaluationError, ConfigError, PluginError, RunDirectoryError, SecretError (of a config that would be kept);
    RolloutError if every attempt failed.
    """
    options = {"num_tasks": num_tasks, "attempts": attempts, "k": k, "temperature": temperature, "seed": seed}
    given = [f"eval.{name}={toml_value(value)}" for name, value in options.items() if value is not None]
    evaluated = _evaluated(source, checkpoint, [*sets, *given])
    if isinstance(source, str) and not evaluated.config.env.id and env is None and not Path(source).exists():
        raise EvaluationError(
            f"there is no file and no directory {source}; if it is a model of the hub, say what it is to do: "
            "env (--env MODULE:NAME) and num_tasks (-n)"
        )
    if model is not None:
        evaluated = replace(evaluated, config=_with_model(evaluated.config, weights_of(Path(model))), checkpoint="")
    if record and evaluated.run is None:
        raise EvaluationError("record=True puts the result into a run's directory; give the run instead of a config")
    if json_file is not None and not Path(json_file).absolute().parent.is_dir():
        raise EvaluationError(f"{Path(json_file).parent}, where {json_file} is to be, is no directory; make it first")
    if save is not None:
        Path(save).mkdir(parents=True, exist_ok=True)  # what cannot be is better known before the work than after it
    began = time.time()
    with configured(evaluated.config, env=env, reward=reward, needs=NEEDED, learns=False) as config:
        from keel.build import build_sampler

        if json_file is not None or record:
            refuse_secrets(_recorded_sections(config))
        with build_sampler(config, None) as collector:
            trajectories = play(collector, config.eval)
        result = summarize_as(trajectories, config.eval, model=_name_of(evaluated, config), env=config.env.id)
        written = scrubbed_values({**_facts(evaluated, config, began), **result.to_json()})
    if save is not None:
        _save_trajectories(Path(save), trajectories)
    if json_file is not None:
        write_json(Path(json_file), written)
    if record and evaluated.run is not None:
        _record(evaluated.run, evaluated.checkpoint or "model", written)
    return result


def measure_tasks(collector: Collector, config: EvalConfig) -> EvaluationResult:
    """What `config` asks for, of the policy that the collector's engine has now.

    Raises EvaluationError if that is none, or more than the environment holds out; RolloutError if all attempts failed.
    """
    return summarize_as(play(collector, config), config)


def held_out_alarm(collector: Collector, config: EvalConfig) -> Alarm | None:
    """A warning if tasks of the evaluation are trained on too, told by their content; None if none was seen.

    A success rate of such tasks says what was memorized. The first `LOOKED_AT` tasks that are trained on are looked at.
    """
    trained, held_out = collector.tasks("train"), collector.tasks("eval")
    seen = {_content(trained[index]) for index in range(min(len(trained), LOOKED_AT))}
    num_asked = min(len(held_out), config.num_tasks)
    shared = sum(_content(held_out[index]) in seen for index in range(num_asked))
    if not shared:
        return None
    text = (
        f"{shared} of the {num_asked} tasks of the evaluation are among the tasks that are trained on, so its success "
        'says less than it seems to; let tasks("train") and tasks("eval") of the environment share none'
    )
    return Alarm("held_out_shared", "warn", text, first_step=0)


def play(collector: Collector, config: EvalConfig) -> list[Trajectory]:
    """`config.attempts` episodes at each of the first `config.num_tasks` held-out tasks, one after the other."""
    if config.num_tasks == 0:
        raise EvaluationError("eval.num_tasks is 0, so there is nothing to evaluate: set it to a number of tasks")
    held_out = collector.tasks("eval")
    if len(held_out) < config.num_tasks:
        raise EvaluationError(
            f"eval.num_tasks is {config.num_tasks}, but the environment holds out {len(held_out)} tasks: "
            "lower it, or let the environment make more"
        )
    tasks = [held_out[index] for index in range(config.num_tasks)]
    return collector.collect_eval(tasks, temperature=config.temperature, seed=config.seed, attempts=config.attempts)


def _content(task: Task) -> bytes:
    """What tells tasks apart: their data, or, of a task without any that is JSON, its id."""
    try:
        return canonical(task.data) if task.data else repr(task.id).encode()
    except BadRowError:
        return repr(task.id).encode()


def summarize_as(
    trajectories: Sequence[Trajectory], config: EvalConfig, *, model: str = "", env: str = ""
) -> EvaluationResult:
    """The result of `play`; `model` and `env` are names for people."""
    return summarize(
        trajectories,
        attempts=config.attempts,
        ks=config.k or usual_ks(config.attempts),
        model=model,
        env=env,
        temperature=config.temperature,
        seed=config.seed,
    )


def usual_ks(attempts: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to `attempts`, and that: the k of pass@k that are told when none are named."""
    powers = [2**power for power in range(attempts.bit_length()) if 2**power <= attempts]
    return tuple(dict.fromkeys([*powers, attempts]))


def weights_of(path: Path) -> Path:
    """The Hugging Face directory at `path`: itself, or, of a checkpoint or a run, what holds its weights."""
    if (path / "weights").is_dir():
        return path / "weights"
    if (path / "config.toml").is_file():
        return load_run(path).weights()
    return path


def _evaluated(source: ConfigSource | Run, checkpoint: int | str | None, sets: Sequence[str]) -> Evaluated:
    """What `source` is, with `sets` on top."""
    if isinstance(source, Run):
        return _of_run(source, checkpoint, sets)
    path = Path(source) if isinstance(source, str | os.PathLike) else None
    if path is not None and (path / "config.toml").is_file():
        return _of_run(load_run(path), checkpoint, sets)
    if checkpoint is not None:
        raise EvaluationError(f"checkpoint {checkpoint!r} is a run's, and no run is given; give its directory")
    if path is None:
        return Evaluated(_with_sets(read_config(source)[0], sets))
    if not path.exists() and (recipe := recipe_text(str(source))) is not None:
        return Evaluated(config_load.parse_located(recipe, str(source), sets)[0])
    if path.is_file() or path.suffix == ".toml":
        return Evaluated(config_load.parse_located(config_load.read_text(path), str(path), sets)[0])
    if path.is_dir() and not any((weights_of(path) / name).is_file() for name in MODEL_FILES):
        raise EvaluationError(
            f"{path} is neither a run (it has no config.toml) nor a model (no {' or '.join(MODEL_FILES)}); give a "
            "config file, a run's directory, or a model"
        )
    return Evaluated(_with_sets(_with_model(read_config({})[0], weights_of(path)), sets))


def _of_run(run: Run, checkpoint: int | str | None, sets: Sequence[str]) -> Evaluated:
    if isinstance(checkpoint, str) and checkpoint.isdecimal():
        checkpoint = int(checkpoint)
    weights = run.weights(None if checkpoint == "latest" else checkpoint)
    return Evaluated(_with_sets(_with_model(run.config, weights), sets), run.path, weights.parent.name)


def _with_model(config: TrainConfig, path: Path) -> TrainConfig:
    """`config` with the weights at `path`; what would come before training, or make a tiny model, is left out."""
    sets = [f"model.path={toml_value(str(path))}", 'model.revision=""', 'model.tiny.preset=""', "warm_start.steps=0"]
    return _with_sets(config, [*sets, "model.lora.rank=0"])  # an adapter that lies at `path` is put on all the same


def _with_sets(config: TrainConfig, sets: Sequence[str]) -> TrainConfig:
    """Raises ConfigError as for a file's config."""
    return config_load.parse_located(config_load.dump(config), "config", sets)[0] if sets else config


def _name_of(evaluated: Evaluated, config: TrainConfig) -> str:
    if evaluated.run is not None and evaluated.checkpoint:
        return f"{evaluated.run.resolve().name}, checkpoint {evaluated.checkpoint}"
    return config.model.path or f"tiny {config.model.tiny.preset}"


def _facts(evaluated: Evaluated, config: TrainConfig, began: float) -> dict[str, Any]:
    """What a result is worth nothing without: what was evaluated, how, by which Keel, when."""
    return {
        "kind": "evaluation",
        "keel_version": keel.__version__,
        "unix_s": began,
        "seconds": time.time() - began,
        "run": "" if evaluated.run is None else evaluated.run.resolve().name,
        "checkpoint": evaluated.checkpoint,
        "config": _recorded_sections(config),
    }


def _recorded_sections(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", include=set(RECORDED_SECTIONS))


def _save_trajectories(directory: Path, trajectories: Sequence[Trajectory]) -> None:
    write_trajectories(directory / "trajectories.jsonl", trajectories, with_tokens=True)


def _record(run: Path, name: str, written: dict[str, Any]) -> None:
    """Write RUN/evaluations/<name>.json; with a number if there is one of that name, which is never replaced."""
    directory = run / "evaluations"
    directory.mkdir(exist_ok=True)
    number = 1
    while (path := directory / (f"{name}.json" if number == 1 else f"{name}-{number}.json")).exists():
        number += 1
    write_json(path, {"name": path.stem, **written})
