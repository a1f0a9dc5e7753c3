"""The other side of `EngineProcess`: what runs in the spawned process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from keel.config import EngineConfig, ModelConfig
from keel.dist.stacks import write_stacks_when_asked
from keel.engines.base import EngineError
from keel.engines.identity import identity_of
from keel.sync.base import SyncError

if TYPE_CHECKING:
    from keel.engines.embedded.engine import EmbeddedEngine

PARENT_CHECK_S = 1.0


@dataclass(frozen=True)
class WorkerSpec:
    """What the process is to load; plain, so that it can be pickled."""

    model: ModelConfig
    config: EngineConfig
    max_sequence_tokens: int
    version: int
    num_threads: int
    device: str = "cpu"
    stacks: str = ""
    numerics: str = "fast"


def run_worker(connection: Connection, spec: WorkerSpec) -> None:
    """Load the engine, say "ready" (or "failed" and why), then serve calls until told to stop or left alone."""
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the parent decides what they mean
        signal.signal(number, signal.SIG_IGN)
    if spec.stacks:
        write_stacks_when_asked(spec.stacks)
    try:
        engine = _load(spec)
    except Exception as error:  # noqa: BLE001  (whatever it was, the parent must be told)
        connection.send(("failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        return
    model = spec.model
    identity = identity_of(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    connection.send(("ready", replace(engine.capabilities(), identity=identity)))
    asyncio.run(_Server(connection, engine, parent).serve())


def _load(spec: WorkerSpec) -> EmbeddedEngine:
    import torch

    from keel.engines.embedded.engine import EmbeddedEngine
    from keel.engines.embedded.load import load_policy

    if spec.num_threads:
        torch.set_num_threads(spec.num_threads)
    if spec.numerics == "exact":
        torch.use_deterministic_algorithms(True)
    policy = load_policy(spec.model, spec.device, spec.numerics)
    return EmbeddedEngine(
        policy, spec.config, max_sequence_tokens=spec.max_sequence_tokens, version=spec.version, shares_weights=False
    )


class _Server:
    """Runs each call as a task of its own; one thread reads the pipe."""

    def __init__(self, connection: Connection, engine: EmbeddedEngine, parent: int) -> None:
        self._connection, self._engine, self._parent = connection, engine, parent
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._over = asyncio.Event()

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop,), name="keel-engine-calls", daemon=True).start()
        await self._over.wait()
        await self._engine.close()
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """Messages to the loop, in order, until the pipe closes or the parent is another: then it is over."""
        with contextlib.suppress(EOFError, OSError):
            while os.getppid() == self._parent:
                if self._connection.poll(PARENT_CHECK_S):
                    loop.call_soon_threadsafe(self._take, self._connection.recv())
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._over.set)

    def _take(self, message: tuple[Any, ...]) -> None:
        if message[0] == "close":
            self._over.set()
        elif message[0] == "cancel":
            task = self._tasks.get(message[1])
            if task is not None:
                task.cancel()
        else:
            _, number, method, arguments = message
            task = asyncio.get_running_loop().create_task(self._answer(number, method, arguments))
            self._tasks[number] = task
            task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _answer(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            reply = ("result", number, await getattr(self._engine, method)(*arguments))
        except Exception as error:  # noqa: BLE001  (it belongs to the caller, who is in another process)
            known = type(error) in (EngineError, SyncError)
            reply = ("error", number, error if known else EngineError(f"{type(error).__name__}: {error}"))
        with contextlib.suppress(OSError):  # the parent is gone; the reader notices too
            self._connection.send(reply)
