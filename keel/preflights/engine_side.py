"""Any engine, called from a thread without an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from keel.engines.base import (
    Engine,
    EngineCapabilities,
    EngineError,
    EngineHealth,
    GenerateRequest,
    GenerateResult,
    ScoreResult,
)
from keel.rollouts.loop_thread import LoopThread
from keel.sync.base import SyncError, WeightSender
from keel.sync.publish import publish_async

T = TypeVar("T")


class AskedEngine:
    """`EngineSide` over a Keel engine, on an event loop of its own; `timeout_s` bounds every call."""

    def __init__(self, engine: Engine, *, attached: bool = False, may_push: bool = True, timeout_s: float = 300.0):
        self.engine, self.attached, self.may_push = engine, attached, may_push
        self.timeout_s = timeout_s
        self._loop = LoopThread("keel-preflight")
        self.name = engine.capabilities().name

    def capabilities(self) -> EngineCapabilities:
        return self.engine.capabilities()

    def health(self) -> EngineHealth:
        return self._run(self.engine.health())

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        return self._run(_at_most(self.capabilities().max_concurrency, [self.engine.generate(r) for r in requests]))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[ScoreResult]:
        asked = [self.engine.score(tuple(int(token) for token in sequence)) for sequence in sequences]
        return self._run(_at_most(self.capabilities().max_concurrency, asked))

    def end_sessions(self, session_ids: Sequence[str]) -> None:
        self._run(_at_most(8, [self.engine.end_session(session) for session in session_ids]))

    def publish(self, sender: WeightSender, version: int) -> None:
        if not self.may_push:
            raise SyncError(
                "publish: nothing is pushed to a server that was attached to; --allow-weight-push allows it"
            )
        self._run(publish_async(sender, self.engine, version))

    def close(self) -> None:
        """End the loop, and the engine with it; may be called twice."""
        if not self._loop.closed:
            try:
                self._run(self.engine.close())
            finally:
                self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result; what is no fault of Keel's own kinds becomes an EngineError, since engines may be anyone's."""
        try:
            return self._loop.run(asyncio.wait_for(coroutine, self.timeout_s))
        except TimeoutError as error:
            raise EngineError(
                f"the engine did not answer within {self.timeout_s:g} s; see its log, or whether it is overloaded"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if isinstance(error, (EngineError, SyncError)):
                raise
            raise EngineError(f"the engine failed: {type(error).__name__}: {error}") from error


async def _at_most(limit: int, asked: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results, at most `limit` under way at a time; the first failure cancels the rest."""
    gate = asyncio.Semaphore(max(1, limit))

    async def one(coroutine: Coroutine[Any, Any, T]) -> T:
        async with gate:
            return await coroutine

    tasks = [asyncio.ensure_future(one(each)) for each in asked]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for each in asked:
            each.close()  # one that never began would warn
        raise
