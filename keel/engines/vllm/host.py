"""The server behind the engine: there, dead, started again, with the right weights in it.

Everything that a request needs of it goes through `ask`, which asks again after a death; everything that changes it
(weights, pause) goes through one lock, so that a restart never meets a half-done update.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from keel.engines.base import EngineError
from keel.engines.vllm.client import ServerAnswerError, ServerGoneError, VllmClient
from keel.engines.vllm.server import VllmServer
from keel.engines.vllm.snapshot import Snapshot
from keel.sync.base import SyncError, WeightSource

T = TypeVar("T")
DYING_S = 15.0
SETTLING_S = 0.5
BROKEN_CONNECTIONS = 3

logger = logging.getLogger(__name__)


class _MixedWeightsError(SyncError):
    """The model is neither the old nor the new one."""


class Host:
    """A server that is asked. `start` makes a new one after a death; None for one that Keel only attached to."""

    def __init__(
        self,
        client: VllmClient,
        server: VllmServer | None,
        start: Callable[[], VllmServer] | None,
        *,
        version: int,
        max_restarts: int,
        sleeps: bool = False,
    ) -> None:
        """`sleeps`: the server was started with --enable-sleep-mode and can give its key-value memory back."""
        self.client = client
        self.server = server
        self.version = version
        self.restarts = 0
        self.closed = False
        self._start = start
        self._max_restarts = max_restarts
        self._sleeps = sleeps
        self._paused = False
        self._asleep = False
        self._lost = ""
        self._life = 0  # how many servers there have been before this one
        self._snapshot: Snapshot | None = None
        self._locks: dict[asyncio.AbstractEventLoop, asyncio.Lock] = {}

    async def ask(self, question: Callable[[VllmClient], Awaitable[T]]) -> T:
        """The answer to `question`, asked again whenever the server died over it.

        Raises EngineError if the server died more often than `max_restarts`, or is not Keel's to start again.
        """
        broken = 0
        while True:
            self.check_open()
            await self._wake()
            life = self._life
            try:
                return await question(self.client)
            except ServerGoneError as error:
                died: EngineError = error
                broken += 1
            except ServerAnswerError as error:
                if error.status < 500 or await self.client.is_healthy():
                    raise
                died = error
            if not await self._survive(life, died) and broken >= BROKEN_CONNECTIONS:
                raise died

    async def load(self, source: WeightSource, version: int) -> None:
        """Sample from the weights at `source`, as `version`; requests under way go on with them, their keys and values
        made anew. A server that dies over it gets them when it is back.

        Raises SyncError if the weights do not fit (then nothing has changed; if the server died over them, and the new
        one will not have them either, this is lost), EngineError if the server is lost.
        """
        async with self._lock():
            self.check_open()
            before, old_version, life = self._snapshot, self.version, self._life
            self._snapshot = Snapshot.take(source, version)
            try:
                await self._until_done(self._put_weights)
            except BaseException as error:
                self._snapshot.remove()
                self._snapshot, self.version = before, old_version
                # A new server that refused holds what it was started with, not the weights before these.
                kept_old = isinstance(error, SyncError) and not isinstance(error, _MixedWeightsError)
                if not kept_old or life != self._life:
                    await self._give_up(error)
                raise
            if before is not None:
                before.remove()

    async def pause(self) -> None:
        """Draw nothing until `resume`; requests are taken."""
        async with self._lock():
            self.check_open()
            self._paused = True
            await self._until_done(self.client.pause)

    async def resume(self) -> None:
        async with self._lock():
            self.check_open()
            self._paused = False
            await self._until_done(self.client.resume)

    async def release_memory(self) -> None:
        """Forget keys and values; with --enable-sleep-mode their memory is given back until the next request."""
        async with self._lock():
            self.check_open()
            await self._until_done(self._forget)

    def check_open(self) -> None:
        """Raises EngineError if this is closed, or was lost."""
        if self.closed:
            raise EngineError("vllm: the engine is closed")
        if self._lost:
            raise EngineError(self._lost)

    async def close(self) -> None:
        """Stop the server if it is Keel's, and forget the weights kept for it."""
        self.closed = True
        async with self._lock():  # a restart under way is waited for, and then stopped
            await self.client.close()
            if self.server is not None:
                await asyncio.to_thread(self.server.close)
            if self._snapshot is not None:
                self._snapshot.remove()
                self._snapshot = None

    # ---- deaths

    async def _survive(self, life: int, error: EngineError) -> bool:
        """Whether there is a new server, or was one by the time that this was asked; False if the old one lives.

        Goes on if the caller is cancelled: others need the server too.
        """

        async def locked() -> bool:
            async with self._lock():
                return await self._revive(life, error)

        task = asyncio.ensure_future(locked())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever waits raises it
        return await asyncio.shield(task)

    async def _until_done(self, change: Callable[[], Awaitable[None]]) -> None:
        """`change`, or a new server: that comes up with the weights and the pause that are wanted by then."""
        life = self._life
        try:
            await change()
        except ServerGoneError as error:
            if not await self._revive(life, error):
                await change()
        except ServerAnswerError as error:
            if error.status < 500 or await self.client.is_healthy() or not await self._revive(life, error):
                raise

    async def _revive(self, life: int, error: EngineError) -> bool:
        """Under the lock: a new server with all that the old one had, unless there is one already or the old one
        lives (False)."""
        self.check_open()
        if life != self._life:
            return True
        if self.server is None or self._start is None:
            raise EngineError(f"{error}; Keel did not start this server, so whoever did must start it again")
        if await self._lives():
            return False
        if self._snapshot is not None and self._snapshot.source.kind != "file":
            error = EngineError(
                f"{error}; its last weights came by a broadcast, which nobody repeats: resume the run from its "
                'checkpoint, and set sync.transport = "file" to survive such a death'
            )
            await self._give_up(error)
            raise error
        while True:
            if self.restarts >= self._max_restarts:
                await self._give_up(error)
                raise EngineError(self._lost) from error
            self.restarts += 1
            logger.warning("vllm: the server is gone; starting it again (%d. time): %s", self.restarts, error)
            await asyncio.to_thread(self.server.close)
            self.server = await asyncio.to_thread(self._start)
            self.client.url = self.server.url
            self._life += 1
            self._asleep = False
            try:
                await self._put_weights()
                if self._paused:
                    await self.client.pause()
            except ServerGoneError as again:
                error = again
                continue
            return True

    async def _lives(self) -> bool:
        """Whether the server answers, and still does after a moment (one that dies may still say it is well)."""
        assert self.server is not None
        if await self.client.is_healthy():
            await asyncio.sleep(SETTLING_S)
            if await self.client.is_healthy():
                return True
        await asyncio.to_thread(self.server.wait_dead, DYING_S)
        return False

    async def _give_up(self, error: BaseException) -> None:
        """What the server holds, if it is there at all, must not be sampled from."""
        if self.server is None:
            self._lost = f"vllm: the server at {self.client.url} was lost during an update: {error}"
            return
        self._lost = (
            f"vllm: the server is lost after {self.restarts} restarts (engine.vllm.max_restarts is "
            f"{self._max_restarts}): {error}. {self.server.log_path} ends:\n{self.server.log_tail()}"
        )
        await asyncio.to_thread(self.server.close)

    # ---- changes, under the lock

    async def _put_weights(self) -> None:
        """The wanted weights and their version; whatever runs is fed again under them."""
        snapshot, client = self._snapshot, self.client
        if snapshot is None:  # those that it was started with
            await client.set_weight_version(str(self.version))
            return
        await client.pause()
        try:
            await push(client, snapshot.source)
        except SyncError as error:
            if not isinstance(error, _MixedWeightsError) and not self._paused and not self._asleep:
                await client.resume()
            raise
        if not await client.reset_prefix_cache(running=True):
            raise EngineError("vllm: keys and values made with the old weights could not be dropped")
        await client.set_weight_version(str(snapshot.version))
        self.version = snapshot.version
        if not self._paused and not self._asleep:  # the next request takes the memory again, and resumes
            await client.resume()

    async def _forget(self) -> None:
        if self._sleeps:
            await self.client.pause()
            await self.client.post("/release_kv_cache_memory")
            self._asleep = True
        elif not await self.client.reset_prefix_cache():
            raise EngineError("vllm: keys and values are in use and cannot be given back")

    async def _wake(self) -> None:
        """Take the memory for keys and values again, if it was given back."""
        if self._asleep:
            async with self._lock():
                if self._asleep:
                    await self._until_done(self._take_memory)

    async def _take_memory(self) -> None:
        await self.client.post("/wake_up", params={"tags": "kv_cache"})  # which resumes, too
        self._asleep = False
        await (self.client.pause() if self._paused else self.client.resume())

    def _lock(self) -> asyncio.Lock:
        """One per event loop: a lock belongs to the loop it was first waited for on."""
        loop = asyncio.get_running_loop()
        if loop not in self._locks:
            self._locks = {known: lock for known, lock in self._locks.items() if not known.is_closed()}
            self._locks[loop] = asyncio.Lock()
        return self._locks[loop]


async def push(client: VllmClient, source: WeightSource) -> None:
    """Have every worker write the weights at `source`. Raises SyncError with what the workers say."""
    method = "keel_load_file" if source.kind == "file" else "keel_load_broadcast"
    answers = await client.collective_rpc(method, [source.location])
    problems = list(dict.fromkeys(str(answer["problem"]) for answer in answers if answer["problem"]))
    if any(answer["broken"] for answer in answers) or (problems and any(not answer["problem"] for answer in answers)):
        raise _MixedWeightsError(f"vllm: the weights were taken in part: {'; '.join(problems)}")
    if problems or not answers:
        raise SyncError(f"vllm: the weights were not taken: {'; '.join(problems) or 'no worker answered'}")
