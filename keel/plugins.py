"""Plug-ins: an object, `module:name`, or a built-in's short name; keyword-only arguments are its options.

There is no registry to keep in sync: a built-in's short name is the name of a public function or class in the room
that holds that kind, and the options a config may give are read from the target's signature.

A config is data, so an object stands in it under a name, `name_of`: `module:qualname`, which imports it again where
that can be done, and else has a part like `<lambda>` or `<object>`. While a run goes on, `holding` keeps the object
under that name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from keel.types import UserFault

Held = Mapping[tuple[str, str], Any]
"""Objects by the room of their kind ("keel.envs") and their name in the config."""

_held: list[Held] = []


class PluginError(UserFault, ValueError):
    """A plug-in could not be found, or was given options it does not take; says what, got and how to fix."""


def resolve(target: Any, builtin_module: str, others: Sequence[str] = ()) -> Any:
    """The object behind `target`: itself if it is not a string, one that is held under that name, `module:name`, or a
    public name of `builtin_module`. `others` are names of that kind which do not come this way, for the hint.

    Raises PluginError, with the nearest valid name, if there is none.
    """
    if not isinstance(target, str):
        return target
    for held in _held:
        if (builtin_module, target) in held:
            return held[builtin_module, target]
    module_name, _, name = target.rpartition(":")
    builtin = not module_name
    if "<" in name:
        raise PluginError(f"{target!r} was given as an object, which no name imports; {_again(builtin_module)}")
    try:
        module = importlib.import_module(module_name or builtin_module)
    except ImportError as error:
        raise PluginError(f"cannot import {module_name or builtin_module!r} for {target!r}: {error}") from error
    found = _attribute(module, name)
    if found is None and module_name == "__main__":
        raise PluginError(f"no {name!r} in this program, {_again(builtin_module)}")
    if found is None or (builtin and name not in getattr(module, "__all__", ())):
        public = [each for each in vars(module) if not each.startswith("_")]
        names = sorted((*getattr(module, "__all__", ()), *others) if builtin else getattr(module, "__all__", public))
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
        raise PluginError(f"no {name!r} in {module.__name__}; {hint} (own code: 'package.module:name')")
    return found


@contextmanager
def holding(objects: Held) -> Iterator[None]:
    """While the block runs, `resolve` finds `objects` under their names, in every thread of this process.

    Raises PluginError if another block holds a different object under such a name.
    """
    for held in _held:
        for key in objects.keys() & held.keys():
            if held[key] is not objects[key]:
                raise PluginError(
                    f"another run of this process goes on with a different {key[1]!r}; give one of the two another name"
                )
    _held.append(objects)
    try:
        yield
    finally:
        _held[:] = [held for held in _held if held is not objects]


def name_of(target: Any) -> str:
    """`module:qualname` of an object, with a last part in angle brackets if that name does not lead back to it."""
    if isinstance(target, functools.partial):
        return f"{name_of(target.func)}.<partial>"
    if not hasattr(target, "__qualname__"):
        return f"{type(target).__module__}:{type(target).__qualname__}.<object>"
    name = f"{target.__module__}:{target.__qualname__}"
    found = _attribute(sys.modules.get(str(target.__module__)), target.__qualname__)
    return name if "<" in name or found is target else f"{name}.<object>"


def can_be_imported_elsewhere(name: str) -> bool:
    """Whether another process of this program finds by import what `name_of` named: a script's functions yes (`spawn`
    runs the script's file again), those of a notebook or an interactive session no."""
    module_name, _, qualname = name.rpartition(":")
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return "<" not in qualname and (module_name != "__main__" or (script is not None and Path(script).is_file()))


def _attribute(module: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        module = getattr(module, part, None)
    return module


def _again(builtin_module: str) -> str:
    """How to give an object that a config only has the name of."""
    keyword = {"keel.envs": "env", "keel.rewards": "reward", "keel.algo.losses": "loss"}.get(builtin_module)
    if keyword is None:
        return "so name one that can be imported: 'package.module:name'"
    return (
        f"so pass it again, as in keel.resume(run, {keyword}=...), or name one that can be imported: "
        "'package.module:name'"
    )


def check_options(target: Callable[..., Any], options: Mapping[str, Any], what: str) -> None:
    """Raise PluginError unless every option is a keyword-only argument of `target` and none it requires is missing."""
    parameters = inspect.signature(target).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes: {', '.join(known) or 'no options'}"
            raise PluginError(f"{what} has no option {name!r}; {hint}")
    missing = [
        name for name, parameter in known.items() if parameter.default is parameter.empty and name not in options
    ]
    if missing:
        raise PluginError(f"{what} needs the option {', '.join(map(repr, missing))}")
