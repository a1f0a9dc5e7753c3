"""Worker threads for user code that may hang: cheap to hand work to, and never in the way of the program's exit.

The standard executor will not do: its threads are joined at exit, so one hanging tool would keep a finished run
alive, and a thread that hangs stays counted, so a few of them stall everybody else. Here every thread is a daemon;
a thread whose call ran out of time is written off and replaced, and comes back only if its call ever returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from keel.types import Fault


class CallTimeoutError(Exception):
    """A call did not return within its time; raised by `WorkerThreads.call` and `call_with_timeout`."""


class HangingCallsError(Fault, RuntimeError):
    """So many calls hang that no new thread may be made for the next one; the run has to end."""


class _Call:
    """One piece of work on its way through a thread, and the future that waits for it on an event loop."""

    __slots__ = ("abandoned", "arguments", "function", "future", "loop", "returned", "started")

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self.loop.create_future()
        self.started: float | None = None
        self.returned = False
        self.abandoned = False

    def run(self) -> tuple[Any, BaseException | None]:
        try:
            return self.function(*self.arguments), None
        except BaseException as error:  # noqa: BLE001 (user code: even its SystemExit is only an outcome)
            return None, error

    def deliver(self, value: Any, error: BaseException | None) -> None:
        """Hand the outcome to the event loop (called in the worker thread)."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for this outcome any more
            self.loop.call_soon_threadsafe(self._settle, value, error)

    def _settle(self, value: Any, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(value)
        else:
            self.future.set_exception(_as_exception(error))


class WorkerThreads:
    """Daemon threads that are reused, grow with need up to `limit`, and are replaced when they hang.

    At most `limit` threads work at once and at most `hanging_limit` more may be lost in calls that never return.
    Calls wait in order when all threads are busy. A thread that has had nothing to do for `idle_s` ends.
    """

    _QUICK_THREADS = 4  # made at once; quick calls never need more of them
    _PATIENCE_S = 0.005  # a call that waits longer than this shows that calls are slow: then each gets a thread

    def __init__(self, *, limit: int = 512, hanging_limit: int = 4096, idle_s: float = 30.0) -> None:
        self._limit = limit
        self._hanging_limit = hanging_limit
        self._idle_s = idle_s
        self._condition = threading.Condition()
        self._waiting: deque[_Call] = deque()
        self._threads = 0
        self._idle = 0
        self._hanging = 0
        self._made = 0
        self._relief_at = 0.0

    @property
    def hanging(self) -> int:
        """Threads lost, for now, in calls that ran out of time."""
        return self._hanging

    @property
    def threads(self) -> int:
        """Threads at work or ready to be, the hanging ones not counted."""
        return self._threads

    async def call(self, function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
        """The result of `function(*arguments)`, run in a worker thread.

        The time counts from the moment the call starts to run, so a full house does not time calls out. Raises
        CallTimeoutError, HangingCallsError, and what the function raises.
        """
        call = _Call(function, arguments)
        self._submit(call)
        timer = call.loop.call_later(timeout_s, self._check, call, timeout_s)
        try:
            return await call.future
        except asyncio.CancelledError:
            self._abandon(call)
            raise
        finally:
            timer.cancel()

    def _submit(self, call: _Call) -> None:
        with self._condition:
            if self._hanging >= self._hanging_limit:
                raise HangingCallsError(
                    f"{self._hanging} calls of an environment or tool ran out of time and still have not returned; "
                    "give the code behind them its own time-outs (sockets, subprocesses, locks)"
                )
            self._waiting.append(call)
            if self._idle >= len(self._waiting):
                self._condition.notify()
            elif self._threads < min(self._QUICK_THREADS, self._limit):
                self._grow()
            elif self._threads < self._limit and (now := time.monotonic()) >= self._relief_at:
                self._relief_at = now + self._PATIENCE_S
                call.loop.call_later(self._PATIENCE_S, self._relieve)

    def _relieve(self) -> None:
        """On the loop, a little after all threads were busy: a thread for each call that still waits."""
        with self._condition:
            for _ in range(min(len(self._waiting) - self._idle, self._limit - self._threads)):
                self._grow()

    def _grow(self) -> None:
        """One more thread. If there is none at all and none can be had, all waiting calls fail."""
        thread = threading.Thread(target=self._work, name=f"keel-env-{self._made}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads to give
            if self._threads == 0:
                failure = HangingCallsError(f"{error} for an environment's or tool's call; {self._hanging} calls hang")
                while self._waiting:
                    self._waiting.popleft().deliver(None, failure)
            return
        self._threads += 1
        self._made += 1

    def _work(self) -> None:
        while (call := self._next()) is not None:
            value, error = call.run()
            with self._condition:
                call.returned = True
                if call.abandoned:  # written off while it ran, and replaced since: this thread is one too many
                    self._hanging -= 1
                    return
            call.deliver(value, error)
            del call, value, error  # an idle thread must not keep an environment alive

    def _next(self) -> _Call | None:
        with self._condition:
            self._idle += 1
            try:
                while not self._waiting:
                    if not self._condition.wait(self._idle_s) and not self._waiting:
                        self._threads -= 1
                        return None
                call = self._waiting.popleft()
                call.started = time.monotonic()
                return call
            finally:
                self._idle -= 1

    def _check(self, call: _Call, timeout_s: float) -> None:
        """On the loop, when a call's time may be over: time it out, or look again later if it started late."""
        with self._condition:
            if call.future.done() or call.returned:
                return
            left = timeout_s if call.started is None else call.started + timeout_s - time.monotonic()
        if left > 0:
            call.loop.call_later(left, self._check, call, timeout_s)
        elif self._abandon(call):
            call.future.set_exception(CallTimeoutError(f"no answer within {timeout_s:g} s"))

    def _abandon(self, call: _Call) -> bool:
        """Nobody waits for this call any more: forget it if it waits, write its thread off if it runs.

        False if it has returned, so that its outcome is already on the way.
        """
        with self._condition:
            if call.returned:
                return False
            if call.started is None:
                self._waiting.remove(call)
            else:
                call.abandoned = True
                self._hanging += 1
                self._threads -= 1
                if len(self._waiting) > self._idle and self._threads < self._limit:
                    self._grow()
            return True


def _as_exception(error: BaseException) -> Exception:
    """An Exception for the waiting side: user code that raises SystemExit, say, must not end the event loop."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):  # a future refuses StopIteration
        return error
    wrapped = RuntimeError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


@functools.cache
def worker_threads() -> WorkerThreads:
    """The process's own worker threads, made on first use."""
    return WorkerThreads()
