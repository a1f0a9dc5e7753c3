"""Plug-ins: an object, `module:name`, or a built-in's short name; keyword-only arguments are its options.

There is no registry to keep in sync: a built-in's short name is the name of a public function or class in the room
that holds that kind, and the options a config may give are read from the target's signature.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any


class PluginError(ValueError):
    """A plug-in could not be found, or was given options it does not take; says what, got and how to fix."""


def resolve(target: Any, builtin_module: str) -> Any:
    """The object behind `target`: itself if it is not a string, `module:name`, or a public name of `builtin_module`.

    Raises PluginError, with the nearest valid name, if there is none.
    """
    if not isinstance(target, str):
        return target
    module_name, _, name = target.rpartition(":")
    builtin = not module_name
    try:
        module = importlib.import_module(module_name or builtin_module)
    except ImportError as error:
        raise PluginError(f"cannot import {module_name or builtin_module!r} for {target!r}: {error}") from error
    found = getattr(module, name, None)
    if found is None or (builtin and name not in getattr(module, "__all__", ())):
        names = sorted(getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")]))
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
        raise PluginError(f"no {name!r} in {module.__name__}; {hint} (own code: 'package.module:name')")
    return found


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
