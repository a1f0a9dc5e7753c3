"""An event loop for callers without one: results, errors, interruptions, and an end without leftovers."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Iterator

import pytest

from keel.rollouts.loop_thread import LoopThread


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    made = LoopThread()
    yield made
    made.close()


async def add(a: int, b: int) -> int:
    await asyncio.sleep(0)
    return a + b


def main_thread_waits() -> bool:
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return frame.f_code is threading.Condition.wait.__code__


def test_results_and_errors_come_back(loop: LoopThread) -> None:
    async def fail() -> None:
        raise KeyError("no")

    assert loop.run(add(2, 3)) == 5
    with pytest.raises(KeyError, match="no"):
        loop.run(fail())


def test_ctrl_c_cancels_what_the_caller_waits_for(loop: LoopThread) -> None:
    cancelled = threading.Event()

    async def interrupted() -> None:
        try:
            while not main_thread_waits():  # noqa: ASYNC110 (another thread's stack: there is no event to await)
                await asyncio.sleep(0)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    with pytest.raises(KeyboardInterrupt):
        loop.run(interrupted())
    assert cancelled.wait(10.0)
    assert loop.run(add(1, 1)) == 2


def test_waiting_on_the_loops_own_thread_is_refused(loop: LoopThread) -> None:
    async def inner() -> None:
        loop.run(add(1, 1))

    with pytest.raises(RuntimeError, match="wait for itself"):
        loop.run(inner())


def test_closing_lets_tasks_clean_up_and_ends_the_thread() -> None:
    loop = LoopThread("keel-test")
    cleaned: list[bool] = []
    started = threading.Event()

    async def endless() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    future = loop.begin(endless())
    assert started.wait(10.0)
    loop.close()
    loop.close()
    assert cleaned == [True]
    assert future.cancelled()
    assert loop.closed
    assert "keel-test" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(RuntimeError, match="closed"):
        loop.run(add(1, 1))
