"""Calling user code, plain or async, with a time limit that holds even against code that ignores cancellation."""

from __future__ import annotations

import asyncio
import inspect
import time
import traceback
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from keel.envs.threads import CallTimeoutError, WorkerThreads, worker_threads


async def call_with_timeout(
    function: Callable[..., Any], *arguments: Any, timeout_s: float, threads: WorkerThreads | None = None
) -> Any:
    """The result of `function(*arguments)` within `timeout_s` seconds.

    A plain function runs in a worker thread, an async one on the running loop (where it must not block). A function
    that runs out of time is left behind: its thread is written off, its task cancelled and not waited for.
    Raises CallTimeoutError, HangingCallsError, and what the function raises; an async function that cancels itself or
    raises SystemExit gives a RuntimeError.
    """
    if inspect.iscoroutinefunction(function):
        return await _within(function(*arguments), timeout_s)
    begin = time.monotonic()
    result = await (threads or worker_threads()).call(function, *arguments, timeout_s=timeout_s)
    if inspect.isawaitable(result):
        return await _within(result, timeout_s - (time.monotonic() - begin))
    return result


async def _within(awaitable: Any, timeout_s: float) -> Any:
    # asyncio.wait_for waits for a cancelled task to end, so code that swallows cancellation would hold it for ever.
    task = asyncio.ensure_future(_guarded(awaitable))
    try:
        done, _ = await asyncio.wait((task,), timeout=max(timeout_s, 0.0))
    except asyncio.CancelledError:
        _leave(task)
        raise
    if not done:
        _leave(task)
        raise CallTimeoutError(f"no answer within {timeout_s:g} s")
    if task.cancelled():
        raise RuntimeError("CancelledError: it cancelled itself")
    return task.result()


async def _guarded(awaitable: Any) -> Any:
    try:
        return await awaitable
    except (SystemExit, KeyboardInterrupt) as error:  # either would end the event loop that all episodes share
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _leave(task: asyncio.Future[Any]) -> None:
    task.cancel()
    task.add_done_callback(_forget)


def _forget(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()  # read, so that asyncio does not report it as never retrieved


def told(error: BaseException) -> str:
    """An exception in one line, with the place in the user's code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({PurePath(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
