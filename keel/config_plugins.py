"""Checks the plug-ins a config names: that they exist, and that they take the options they are given.

This imports the rooms that hold them (and torch with those), so it runs only after everything cheaper has passed.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from keel import plugins
from keel.config import TrainConfig
from keel.config_problems import Problem, Where, shown
from keel.config_schema import Path, type_words

ALGO_ROOMS = {
    "advantage": "keel.algo.advantage",
    "loss": "keel.algo.losses",
    "correction": "keel.algo.correction",
    "trust_region": "keel.algo.trust_region",
    "reduction": "keel.algo.reduction",
}
ENV_ROOM = "keel.envs"
ENGINE_ROOM = "keel.engines"
ENGINES = ("embedded", "vllm")
"""Those that need more than a plug-in gets, so they are not found as plug-ins."""
REWARD_ROOM = "keel.rewards"


def plugin_modules(config: TrainConfig) -> list[str]:
    """Modules outside Keel that the plug-ins of `config` are in; nothing is imported to find out."""
    algo = [getattr(config.algo, name) for name in ALGO_ROOMS]
    ids = [plugin.id for given in algo for plugin in (given if isinstance(given, tuple) else (given,))]
    ids += [config.env.id, config.env.reward.id, config.engine.id, config.warm_start.demonstrations]
    modules = {name.rpartition(":")[0] for name in ids}
    return sorted(module for module in modules if module and module.partition(".")[0] != "keel")


def check_plugins(config: TrainConfig, where: Where) -> list[Problem]:
    """Every fault of the plug-ins in `config`; empty sections (an environment given as an object) are left alone."""
    problems = []
    for name, room in ALGO_ROOMS.items():
        given = getattr(config.algo, name)
        for plugin in given if isinstance(given, tuple) else (given,):
            problems += _check(plugin.id, room, plugin.options, ("algo", name), ("algo", name, "id"), where)
    if config.env.id:
        problems += _check(config.env.id, ENV_ROOM, config.env.options, ("env", "options"), ("env", "id"), where)
    if config.engine.id not in ENGINES:
        problems += _check(config.engine.id, ENGINE_ROOM, None, ("engine",), ("engine", "id"), where)
    if config.env.reward.id != "none":
        reward = config.env.reward
        problems += _check(reward.id, REWARD_ROOM, reward.options, ("env", "reward"), ("env", "reward", "id"), where)
    if (config.warm_start.steps > 0 or config.model.tiny.preset) and not problems:
        problems += _check_demonstrations(config, where)
    return problems


def _check(
    target_id: str, room: str, options: Mapping[str, Any] | None, options_path: Path, id_path: Path, where: Where
) -> list[Problem]:
    name = ".".join(id_path)
    try:
        target = plugins.resolve(target_id, room, ENGINES if room == ENGINE_ROOM else ())
    except plugins.PluginError as error:
        return [Problem(where(id_path), f"{name} names no plug-in", shown(target_id), str(error))]
    if not callable(target):
        fix = "name a function or a class"
        return [Problem(where(id_path), f"{name} is not callable", f"{target_id} is a {type(target).__name__}", fix)]
    if options is None:
        return []
    try:
        plugins.check_options(target, options, target_id)
    except plugins.PluginError as error:
        wrong = next((option for option in options if repr(option) in str(error)), None)
        path = (*options_path, wrong) if wrong else id_path
        return [Problem(where(path), f"wrong options for {target_id}", shown(dict(options)), str(error))]
    return _check_types(target, options, options_path, where)


def _check_types(target: Callable[..., Any], options: Mapping[str, Any], path: Path, where: Where) -> list[Problem]:
    """Compare each option with its annotation; one that pydantic knows nothing of is the plug-in's own business."""
    function = target.__init__ if inspect.isclass(target) else target
    if not inspect.isroutine(function):  # an object that can be called
        function = type(function).__call__
    try:
        hints = typing.get_type_hints(function)
    except NameError:
        return []  # names imported for type checkers alone
    problems = []
    for name, value in options.items():
        if name not in hints:
            continue
        try:
            adapter = TypeAdapter(hints[name])
        except PydanticSchemaGenerationError:
            continue
        try:
            # A list stands for a tuple in TOML, hence not strict for containers; strict for everything else.
            adapter.validate_python(value, strict=not isinstance(value, (list, dict)))
        except ValidationError as error:
            fix = f"{name} takes {type_words(hints[name])}: {error.errors()[0]['msg']}"
            problems.append(
                Problem(where((*path, name)), f"option {name!r} has a value it does not take", shown(value), fix)
            )
    return problems


def _check_demonstrations(config: TrainConfig, where: Where) -> list[Problem]:
    """A warm start needs something to imitate; a tiny model's tokenizer learns from the tasks if there is nothing."""
    path = ("warm_start", "demonstrations")
    if config.warm_start.demonstrations:
        return _check(config.warm_start.demonstrations, ENV_ROOM, None, path, path, where)
    if config.warm_start.steps == 0:
        return []
    env = plugins.resolve(config.env.id, ENV_ROOM) if config.env.id else None
    base = plugins.resolve("keel.envs.base:Env", ENV_ROOM)
    if not inspect.isclass(env) or getattr(env, "demonstrations", None) not in (None, base.demonstrations):
        return []  # it has some, or is an object or a factory, which the run itself asks
    got = f"steps = {config.warm_start.steps}, environment {config.env.id} without demonstrations"
    fix = 'name demonstrations = "package.module:name", give the environment a method demonstrations, or set steps = 0'
    return [Problem(where(("warm_start", "steps")), "a warm start needs demonstrations", got, fix)]
