"""Runs keel's command line and kills the process at a chosen moment: `python killing.py AIM train run.toml`.

AIM is JSON: `at` names a function or method as it is looked up, "package.module:Class.method"; the process dies at its
call number `call` (1 is the first), counting only calls whose arguments, printed, hold `match`, and only those after
call number n of another function f if `armed_by` is [f, n]. `how` is the manner of death:

    before      killed as the call begins
    after       killed when the call has done its work
    torn        the call writes half of the file (or line) it was to write, then killed
    interrupt   Ctrl-C as the call begins
    terminate   SIGTERM as the call begins
    at once     Ctrl-C as the call begins, and again as soon as the first has been answered

Nothing of keel is replaced: the call does what it always does until the process is gone.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def die() -> None:
    """As `kill -9` does it: no handler, no finally, no buffer is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()  # the signal is on its way


def interrupt(number: signal.Signals = signal.SIGINT) -> None:
    """As a terminal does it: to the process, whichever thread this is."""
    os.kill(os.getpid(), number)


def interrupt_again(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let the answer to an interrupt be given, and interrupt once more."""
    result = function(*args, **kwargs)
    interrupt()
    return result


def tear(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let the call write beside its file; append the first half of what it wrote to the file itself; die."""
    position, path = next((i, arg) for i, arg in enumerate(args) if isinstance(arg, Path))
    whole = path.with_name(f"{path.name}.whole")
    function(*args[:position], whole, *args[position + 1 :], **kwargs)
    content = whole.read_bytes()
    whole.unlink()
    with path.open("ab") as file:
        file.write(content[: len(content) // 2])
    die()


def lookup(name: str) -> tuple[Any, str]:
    """The object that holds the function "module:a.b", and the name it has there."""
    module, _, dotted = name.partition(":")
    *parents, attribute = dotted.split(".")
    return functools.reduce(getattr, parents, importlib.import_module(module)), attribute


def watch(name: str, wrapped: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Let every call of `name` go through `wrapped(function, args, kwargs)`."""
    owner, attribute = lookup(name)
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapped(function, args, kwargs)

    setattr(owner, attribute, call)


def take_aim(at: str, call: int = 1, how: str = "before", match: str = "", armed_by: tuple[str, int] = ("", 0)) -> None:
    """Prepare this process to die as the module's docstring says."""
    armed = not armed_by[0]
    calls = arming_calls = 0

    def arm(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal armed, arming_calls
        arming_calls += 1
        armed = armed or arming_calls >= armed_by[1]
        return function(*args, **kwargs)

    def kill(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal calls
        calls += armed and match in f"{args} {kwargs}"
        if not armed or calls != call or match not in f"{args} {kwargs}":
            return function(*args, **kwargs)
        calls += 1  # once is enough
        if how == "torn":
            tear(function, args, kwargs)
        if how == "before":
            die()
        if how in ("interrupt", "terminate", "at once"):
            interrupt(signal.SIGTERM if how == "terminate" else signal.SIGINT)
        result = function(*args, **kwargs)
        if how == "after":
            die()
        return result

    if armed_by[0]:
        watch(armed_by[0], arm)
    watch(at, kill)
    if how == "at once":
        watch("keel.monitor.watchdog:Watchdog.say", interrupt_again)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    aim = json.loads(sys.argv.pop(1))
    if aim:
        take_aim(**aim)
    from keel.cli import main

    main()
