"""Time limits hold against code that hangs, blocks or ignores cancellation, and nothing of it delays anybody else."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Awaitable

import pytest

from keel.envs.calls import call_with_timeout
from keel.envs.threads import CallTimeoutError, HangingCallsError, WorkerThreads

LONG_S = 60.0
SHORT_S = 0.05


@pytest.fixture
def release():
    """An event that hanging calls wait for, set at the end so that their threads go away."""
    event = threading.Event()
    yield event
    event.set()


def test_the_result_and_the_error_of_a_call_come_back() -> None:
    async def scenario() -> None:
        threads = WorkerThreads()
        assert await threads.call(divmod, 17, 5, timeout_s=LONG_S) == (3, 2)
        with pytest.raises(ZeroDivisionError):
            await threads.call(divmod, 17, 0, timeout_s=LONG_S)

    asyncio.run(scenario())


@pytest.mark.parametrize("raised", [SystemExit, KeyboardInterrupt, StopIteration, GeneratorExit])
def test_exceptions_that_would_end_the_loop_become_ordinary_ones(raised: type[BaseException]) -> None:
    def leave() -> None:
        raise raised("bye")

    async def leave_async() -> None:
        raise raised("bye")

    async def scenario() -> None:
        with pytest.raises(RuntimeError, match=raised.__name__):
            await WorkerThreads().call(leave, timeout_s=LONG_S)
        if raised in (SystemExit, KeyboardInterrupt):
            with pytest.raises(RuntimeError, match=raised.__name__):
                await call_with_timeout(leave_async, timeout_s=LONG_S)

    asyncio.run(scenario())


def test_a_hanging_call_times_out_and_others_go_on(release: threading.Event) -> None:
    async def scenario() -> WorkerThreads:
        threads = WorkerThreads(limit=2)
        hanging = [threads.call(release.wait, timeout_s=SHORT_S) for _ in range(6)]
        async with asyncio.timeout(10.0):
            outcomes = await asyncio.gather(*hanging, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [CallTimeoutError] * 6
        assert threads.hanging == 6
        async with asyncio.timeout(10.0):
            assert await threads.call(len, "abc", timeout_s=LONG_S) == 3  # both threads were lost, and replaced
        return threads

    threads = asyncio.run(scenario())
    assert threads.threads <= 2


def test_a_lost_thread_ends_when_its_call_returns(release: threading.Event) -> None:
    async def scenario() -> None:
        threads = WorkerThreads()
        running: list[threading.Thread] = []

        def hang() -> None:
            running.append(threading.current_thread())
            release.wait()

        with pytest.raises(CallTimeoutError):
            await threads.call(hang, timeout_s=SHORT_S)
        release.set()
        await asyncio.to_thread(running[0].join, LONG_S)
        assert not running[0].is_alive()
        assert threads.hanging == 0

    asyncio.run(scenario())


def test_waiting_for_a_free_thread_does_not_count_as_time(release: threading.Event) -> None:
    async def scenario() -> None:
        threads = WorkerThreads(limit=1)
        first = asyncio.ensure_future(threads.call(release.wait, timeout_s=LONG_S))
        waiting = asyncio.ensure_future(threads.call(len, "ab", timeout_s=SHORT_S))
        done, _ = await asyncio.wait((first, waiting), timeout=4 * SHORT_S)
        assert not done
        release.set()
        assert await waiting == 2
        assert await first

    asyncio.run(scenario())


def test_too_many_hanging_calls_are_refused(release: threading.Event) -> None:
    async def scenario() -> None:
        threads = WorkerThreads(hanging_limit=2)
        for _ in range(2):
            with pytest.raises(CallTimeoutError):
                await threads.call(release.wait, timeout_s=SHORT_S)
        with pytest.raises(HangingCallsError, match="2 calls"):
            await threads.call(len, "a", timeout_s=LONG_S)

    asyncio.run(scenario())


def test_calls_fail_if_the_system_has_no_thread_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def scenario() -> None:
        threads = WorkerThreads()
        monkeypatch.setattr(threading.Thread, "start", refuse)
        async with asyncio.timeout(10.0):
            with pytest.raises(HangingCallsError, match="can't start new thread"):
                await threads.call(len, "a", timeout_s=LONG_S)
            monkeypatch.undo()
            assert await threads.call(len, "a", timeout_s=LONG_S) == 1

    asyncio.run(scenario())


def test_slow_calls_run_side_by_side_and_quick_ones_share_few_threads() -> None:
    async def scenario() -> None:
        threads = WorkerThreads()
        barrier = threading.Barrier(12)
        await asyncio.gather(*(threads.call(barrier.wait, timeout_s=LONG_S) for _ in range(12)))
        assert threads.threads >= 12
        few = WorkerThreads()
        for _ in range(300):
            await few.call(len, "abc", timeout_s=LONG_S)
        assert few.threads <= 4

    asyncio.run(scenario())


def test_idle_threads_end() -> None:
    async def scenario() -> None:
        threads = WorkerThreads(idle_s=0.01)
        thread = await threads.call(threading.current_thread, timeout_s=LONG_S)
        await asyncio.to_thread(thread.join, LONG_S)
        assert threads.threads == 0
        assert await threads.call(len, "abc", timeout_s=LONG_S) == 3

    asyncio.run(scenario())


def test_a_cancelled_wait_writes_its_thread_off(release: threading.Event) -> None:
    async def scenario() -> None:
        threads = WorkerThreads(limit=1)
        started = threading.Event()

        def hang() -> None:
            started.set()
            release.wait()

        waiting = asyncio.ensure_future(threads.call(hang, timeout_s=LONG_S))
        await asyncio.to_thread(started.wait)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert threads.hanging == 1
        assert await threads.call(len, "abc", timeout_s=LONG_S) == 3

    asyncio.run(scenario())


def test_an_async_call_that_ignores_cancellation_times_out_all_the_same() -> None:
    async def scenario() -> None:
        stop = asyncio.Event()

        async def stubborn() -> None:
            while not stop.is_set():
                try:
                    await stop.wait()
                except asyncio.CancelledError:
                    continue

        with pytest.raises(CallTimeoutError):
            await call_with_timeout(stubborn, timeout_s=SHORT_S)
        stop.set()

    asyncio.run(scenario())


def test_an_async_call_that_cancels_itself_is_an_error_of_its_own() -> None:
    async def cancels_itself() -> None:
        raise asyncio.CancelledError

    async def scenario() -> None:
        with pytest.raises(RuntimeError, match="cancelled itself"):
            await call_with_timeout(cancels_itself, timeout_s=LONG_S)

    asyncio.run(scenario())


def test_a_plain_function_may_return_an_awaitable() -> None:
    async def seven() -> int:
        return 7

    def later() -> Awaitable[int]:
        return seven()

    async def scenario() -> None:
        assert await call_with_timeout(later, timeout_s=LONG_S) == 7

    asyncio.run(scenario())


def test_a_hanging_call_does_not_hold_the_program_at_its_end() -> None:
    program = """
import asyncio, threading
from keel.envs.calls import call_with_timeout
from keel.envs.threads import CallTimeoutError
async def main():
    try:
        await call_with_timeout(threading.Event().wait, timeout_s=0.05)
    except CallTimeoutError:
        print("timed out", flush=True)
asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "timed out\n", "")
