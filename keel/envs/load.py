"""From the config's `[env]` section to something that makes environments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from keel.config import EnvConfig
from keel.envs.base import Env, Split
from keel.envs.calls import told
from keel.plugins import PluginError, check_options, resolve
from keel.types import Fault, Task

EnvFactory = Callable[[], Env]
_NEEDED = ("tasks", "reset", "step")


def env_factory(config: EnvConfig) -> EnvFactory:
    """A function that makes one more environment of the config's kind.

    `config.id` is `package.module:Class` (or a function that returns an environment), or the name of a class in
    `keel.envs`. Raises PluginError if there is none, or if it does not take the options.
    """
    if not config.id:
        raise PluginError("env.id is empty; name an environment: 'package.module:Class', or a built-in: CalculatorEnv")
    target = resolve(config.id, "keel.envs")
    if not callable(target):
        raise PluginError(f"env.id {config.id!r} is a {type(target).__name__}; it must be a class or a function")
    check_options(target, config.options, f"environment {config.id!r}")
    return functools.partial(_make, target, config.id, dict(config.options))


def _make(target: Callable[..., Any], name: str, options: dict[str, Any]) -> Env:
    try:
        made = target(**options)
    except Exception as error:
        raise PluginError(f"environment {name!r} could not be made: {told(error)}") from error
    if not isinstance(made, Env):
        raise PluginError(f"environment {name!r} made a {type(made).__name__}; it must make a keel.envs.base.Env")
    if missing := [method for method in _NEEDED if _inherited(made, method)]:
        raise PluginError(f"environment {name!r} has no {', '.join(missing)}; it needs tasks, reset and step")
    return made


def _inherited(env: Env, method: str) -> bool:
    """Is it `Env`'s own, which only raises?"""
    return getattr(getattr(env, method), "__func__", None) is getattr(Env, method)


def tasks_of(env: Env, split: Split) -> Sequence[Task]:
    """The tasks of a split. Raises PluginError with the place in the environment's code if it cannot tell them."""
    try:
        tasks = env.tasks(split)
        len(tasks)
    except Fault:
        raise
    except Exception as error:
        raise PluginError(f"tasks({split!r}) of {type(env).__name__} raised {told(error)}") from error
    return tasks
