"""An event loop in a thread of its own, for callers that are not async."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for threads without an event loop. One is shared by all that talk to the same engine.

    Ctrl-C in a waiting caller cancels the coroutine it waits for and comes out as KeyboardInterrupt.
    """

    def __init__(self, name: str = "keel-rollout") -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine and return at once. Raises RuntimeError if the loop is closed."""
        if self._loop.is_closed():
            coroutine.close()
            raise RuntimeError("the rollout's event loop is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result; blocks the calling thread, which must not be the loop's own (RuntimeError)."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("run() would wait for itself: it was called on the loop's own thread; await instead")
        return self.wait(self.begin(coroutine))

    def wait(self, future: concurrent.futures.Future[T]) -> T:
        """The result of something begun; if the wait is interrupted, what it waits for is cancelled."""
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what still runs, let it clean up, and end the thread; may be called twice."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


def run_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """The coroutine's result, on a loop of its own: in a notebook's cell the caller's thread has a running one."""
    loop = LoopThread("keel-once")
    try:
        return loop.run(coroutine)
    finally:
        loop.close()


async def _cancel_others(patience_s: float = 5.0) -> None:
    """Cancel all tasks but this one. What ignores its cancellation for `patience_s` is left behind."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=patience_s)
