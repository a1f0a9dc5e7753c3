"""What a caller gives to the Python API: a config in any of its forms, and objects in place of plug-ins' names.

A config stays data: an object stands in it under its name (`keel.plugins.name_of`), and is held under that name while
the run goes on. So nothing else in Keel knows whether a plug-in was named or given.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keel import config_load, plugins
from keel.config import AlgoConfig, Plugin, TrainConfig
from keel.config_plugins import check_plugins
from keel.config_problems import ConfigError, Problem, Where
from keel.envs.base import Env
from keel.plugins import PluginError

ConfigSource = TrainConfig | str | os.PathLike[str] | Mapping[str, Any]
"""A config: an object, the path of a TOML file, the name of a recipe, or a mapping of the same shape as a file."""

ROOMS = {"env": "keel.envs", "reward": "keel.rewards", "loss": "keel.algo.losses"}
RUNNABLE = ("model.path|model.tiny.preset", "env.id")
"""Options that nothing can be run without."""


@contextmanager
def configured(
    config: ConfigSource,
    *,
    env: Any = None,
    reward: Any = None,
    loss: Any = None,
    needs: Sequence[str] = RUNNABLE,
    learns: bool = True,
) -> Iterator[TrainConfig]:
    """The checked config, with the objects given in place of its own; they are held until the block ends.

    `needs` are options that it must have (see `config_load.require`). What only samples has `learns` False: the config
    comes without its `[algo]`, so that a run's loss need not be found to evaluate the run.

    Raises ConfigError with every fault of the config, PluginError for an object that cannot be what it is given as.
    """
    _check_program()
    read, where = read_config(config)
    if not learns:
        read = read.model_copy(update={"algo": AlgoConfig()})
    given = _given(env=env, reward=reward, loss=loss)
    names = {kind: item if isinstance(item, str) else plugins.name_of(item) for kind, item in given.items()}
    held = {(ROOMS[kind], names[kind]): item for kind, item in given.items() if not isinstance(item, str)}
    replaced = _with_names(read, names)
    _check_ranks(replaced, held)
    with plugins.holding(held):
        problems = check_plugins(replaced, where)
        if problems:
            raise ConfigError(problems)
        config_load.require(replaced, needs, _source(config))
        yield replaced


@contextmanager
def given_again(config: TrainConfig, *, env: Any = None, reward: Any = None, loss: Any = None) -> Iterator[None]:
    """Hold the objects under the names that a run's config has for them, until the block ends.

    Raises PluginError for one that would stand in for another plug-in than the one the run began with.
    """
    _check_program()
    held = {}
    for kind, item in _given(env=env, reward=reward, loss=loss).items():
        name = {"env": config.env.id, "reward": config.env.reward.id, "loss": config.algo.loss.id}[kind]
        target = plugins.resolve(item, ROOMS[kind])
        if name != plugins.name_of(target) and _is_found(name, ROOMS[kind]):
            raise PluginError(
                f"the run's {kind} is {name!r}, got {plugins.name_of(target)!r}: leave {kind} out, or change the "
                "config.toml of the run"
            )
        held[ROOMS[kind], name] = target
    _check_ranks(config, held)
    with plugins.holding(held):
        yield


def read_config(config: Any) -> tuple[TrainConfig, Where]:
    """A ConfigSource, its plug-ins unchecked, and what tells where an option was given. Raises ConfigError."""
    if isinstance(config, TrainConfig):
        return config, lambda path: f"config, {'.'.join(path)}"
    if isinstance(config, Mapping):
        return config_load.validate(_plain(config, ()), _in_mapping), _in_mapping
    if isinstance(config, (str, os.PathLike)):
        path = Path(config)
        return config_load.parse_located(config_load.read_text(path), str(path))
    fix = "give a TrainConfig, the path of a TOML file, or a mapping of the same shape as such a file"
    raise ConfigError([Problem("config", "is no config", f"a {type(config).__name__}", fix)])


def _in_mapping(path: Sequence[str]) -> str:
    return f"config, {'.'.join(path)}" if path else "config"


def _source(config: ConfigSource) -> str:
    return str(config) if isinstance(config, (str, os.PathLike)) else "config"


def _plain(value: Any, path: tuple[str, ...]) -> Any:
    """JSON values of what a caller wrote in Python: paths are strings, tuples are lists. Raises ConfigError."""
    if isinstance(value, Plugin):
        return _plain(value.model_dump(), path)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, path) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    fix = "write values as in a TOML file; an object is given beside the config: env=..., reward=..., loss=..."
    raise ConfigError([Problem(_in_mapping(path), "is an object", f"a {type(value).__name__}", fix)])


def _given(**items: Any) -> dict[str, Any]:
    checks = {"env": _check_env, "reward": _check_reward, "loss": _check_loss}
    given = {kind: item for kind, item in items.items() if item is not None}
    for kind, item in given.items():
        if not isinstance(item, str):
            checks[kind](item)
    return given


def _with_names(config: TrainConfig, names: Mapping[str, str]) -> TrainConfig:
    """The config with other plug-ins; options go with the plug-in that they were written for."""
    env, algo = config.env, config.algo
    if "env" in names:
        options = env.options if env.id in ("", names["env"]) else {}
        env = env.model_copy(update={"id": names["env"], "options": options})
    if "reward" in names and env.reward.id != names["reward"]:
        env = env.model_copy(update={"reward": Plugin(id=names["reward"])})
    if "loss" in names and algo.loss.id != names["loss"]:
        algo = algo.model_copy(update={"loss": Plugin(id=names["loss"])})
    return config.model_copy(update={"env": env, "algo": algo})


def _check_program() -> None:
    """A process that `spawn` starts runs the program's file again, to import from it, and must not run it all."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing.spawn asks itself
        raise PluginError(
            "this program starts processes of a learner or an engine, and each runs the program's file again to import "
            'from it: put its top level under `if __name__ == "__main__":`'
        )


def _check_ranks(config: TrainConfig, held: plugins.Held) -> None:
    """A loss runs in the learner's processes, which can only import it."""
    name = config.algo.loss.id
    if config.learner.ranks > 1 and (ROOMS["loss"], name) in held and not plugins.can_be_imported_elsewhere(name):
        raise PluginError(
            f"learner.ranks is {config.learner.ranks}, and the loss {name!r} exists in this process only: write it at "
            "the top level of a file, import it from there, and give that one; or set learner.ranks = 1"
        )


def _is_found(name: str, room: str) -> bool:
    try:
        plugins.resolve(name, room)
    except PluginError:
        return False
    return True


def _check_env(env: Any) -> None:
    if isinstance(env, Env):
        raise PluginError(
            f"env is one {type(env).__name__}, and one instance serves one episode at a time: give the class, or a "
            "function without arguments that makes one more"
        )
    if not callable(env):
        raise PluginError(f"env is a {type(env).__name__}: give an Env class, or a function that makes one")
    _check_takes(env, 0, "env", "no arguments but options by name, and make one more environment")


def _check_reward(reward: Any) -> None:
    names = _parameters(reward, "reward", "(trajectory, task) -> float")
    if "completions" in names:
        raise PluginError(
            f"reward takes {', '.join(names)}: that is TRL's form, which keel.task_env(..., reward=...) takes; here it "
            "is (trajectory, task) -> float"
        )
    _check_takes(reward, 2, "reward", "(trajectory, task) -> float")


def _check_loss(loss: Any) -> None:
    _parameters(loss, "loss", "(LossInputs, *, options) -> (loss per token, metrics)")
    _check_takes(loss, 1, "loss", "(LossInputs, *, options) -> (loss per token, metrics)")


def _parameters(target: Callable[..., Any], kind: str, form: str) -> list[str]:
    if not callable(target):
        raise PluginError(f"{kind} is a {type(target).__name__}: give a function {form}, or 'package.module:name'")
    return list(inspect.signature(target).parameters)


def _check_takes(target: Callable[..., Any], count: int, kind: str, form: str) -> None:
    """Keyword-only options may be missing here: whether they are given is checked with the config."""
    parameters = inspect.signature(target).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if len(required) > count or (len(positional) < count and not takes_any):
        raise PluginError(f"{kind} {plugins.name_of(target)!r} takes {inspect.signature(target)}; it must take {form}")
