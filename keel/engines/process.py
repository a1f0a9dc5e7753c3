"""An engine in a process of its own: the same protocol, calls and answers over a pipe.

The process is started by `spawn` (nothing of the caller is inherited but the pipe), loads the model from its Hugging
Face directory into weights of its own, and gets new ones from files. It ends when told to, when the pipe closes, or
when its parent is gone: never an orphan. The caller's side is one thread that hands answers to whoever waits, so one
engine may be used from one event loop after another.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import signal
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keel.config import EngineConfig, ModelConfig
from keel.engines.base import (
    EngineCapabilities,
    EngineError,
    EngineHealth,
    GenerateRequest,
    GenerateResult,
    ScoreResult,
    WeightSource,
)
from keel.engines.worker import WorkerSpec, run_worker

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 10.0

Method = Literal["generate", "score", "end_session", "load_weights", "pause", "resume", "release_memory", "health"]


@dataclass(frozen=True)
class _Waiter:
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Any]

    def give(self, result: Any, error: BaseException | None) -> None:
        """Settle the future from another thread; its loop may be gone."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: Any, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class EngineProcess:
    """An `EmbeddedEngine` in another process; implements `keel.engines.base.Engine`.

    Made ready before the constructor returns. Whoever calls it from a script must guard the script's top level with
    `if __name__ == "__main__":`, as spawning demands.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        *,
        max_sequence_tokens: int,
        version: int = 0,
        num_threads: int = 0,
        device: str = "cpu",
        numerics: str = "fast",
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        """Start the process and wait until its model is loaded on `device`, with the learner's `numerics`.

        `model.path` is what it loads; `num_threads` 0 leaves the number to torch (the same bits need the same
        number). Raises EngineError, with the process's own words, if it cannot start.
        """
        context = multiprocessing.get_context("spawn")
        self._connection, remote = context.Pipe()
        self._directory = tempfile.TemporaryDirectory(prefix="keel-engine-")
        self.stacks = str(Path(self._directory.name) / "stacks.txt")
        """Where the process writes its stacks on SIGUSR1 (`keel.dist.stacks`)."""
        spec = WorkerSpec(model, config, max_sequence_tokens, version, num_threads, device, self.stacks, numerics)
        self._process = context.Process(target=run_worker, args=(remote, spec), name="keel-engine", daemon=True)
        self._process.start()
        remote.close()
        self._sending = threading.Lock()
        self._waiters: dict[int, _Waiter] = {}
        self._numbers = itertools.count()
        self._dead: str | None = None
        self._capabilities = self._await_ready(start_timeout_s)
        self._reader = threading.Thread(target=self._read, name="keel-engine-reader", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid or 0

    # ---- the protocol

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        result: GenerateResult = await self._call("generate", request)
        return result

    async def score(self, token_ids: tuple[int, ...]) -> ScoreResult:
        result: ScoreResult = await self._call("score", token_ids)
        return result

    async def end_session(self, session_id: str) -> None:
        await self._call("end_session", session_id)

    async def load_weights(self, source: WeightSource, version: int) -> None:
        await self._call("load_weights", source, version)

    async def pause(self) -> None:
        await self._call("pause")

    async def resume(self) -> None:
        await self._call("resume")

    async def release_memory(self) -> None:
        await self._call("release_memory")

    def capabilities(self) -> EngineCapabilities:
        return self._capabilities

    async def health(self) -> EngineHealth:
        """As the engine reports it; a dead process is not an error here but `ok` False."""
        try:
            health: EngineHealth = await self._call("health")
        except EngineError as error:
            return EngineHealth(False, -1, 0, 0, str(error))
        return health

    async def close(self) -> None:
        """Stop the process: asked to, then by its own pid. What runs fails with EngineError."""
        await asyncio.get_running_loop().run_in_executor(None, self.stop)

    # ---- the process

    def stop(self) -> None:
        """`close` for callers without an event loop; safe to call again."""
        if self._dead is None:
            self._dead = "the engine was closed"
            with contextlib.suppress(OSError):
                self._send(("close",))
        self._process.join(STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._reader.join(STOP_TIMEOUT_S)
        self._connection.close()
        self._directory.cleanup()

    def _await_ready(self, timeout_s: float) -> EngineCapabilities:
        """The first message: capabilities, or why there are none."""
        try:
            if not self._connection.poll(timeout_s):
                raise EngineError(f"engine process: not ready after {timeout_s:.0f} s; is the model very large?")
            kind, content = self._connection.recv()
            if kind != "ready":
                raise EngineError(f"engine process: could not start: {content}")
        except (EOFError, OSError) as error:
            self._process.join(STOP_TIMEOUT_S)
            raise EngineError(
                f"engine process: ended with code {self._process.exitcode} before it was ready. A script that starts "
                'one needs `if __name__ == "__main__":` around its top level'
            ) from error
        except BaseException:
            self._process.kill()
            self._process.join(STOP_TIMEOUT_S)
            raise
        capabilities: EngineCapabilities = content
        return capabilities

    async def _call(self, method: Method, *arguments: Any) -> Any:
        """Send a call, wait for its answer. Being cancelled cancels it over there too."""
        loop = asyncio.get_running_loop()
        number, future = next(self._numbers), loop.create_future()
        self._waiters[number] = _Waiter(loop, future)
        try:
            self._check_alive()
            self._send(("call", number, method, arguments))
            return await future
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                self._send(("cancel", number))
            raise
        except OSError as error:  # the reading thread finds the pipe closed too, and learns how the process ended
            await asyncio.to_thread(self._reader.join, 2 * STOP_TIMEOUT_S)
            raise EngineError(self._dead or f"engine process {self.pid}: the pipe is closed") from error
        finally:
            self._waiters.pop(number, None)

    def _send(self, message: tuple[Any, ...]) -> None:
        with self._sending:
            self._connection.send(message)

    def _read(self) -> None:
        """The reading thread: answers to waiters, until the pipe closes; then everybody learns of it."""
        fault = ""
        try:
            while True:
                kind, number, content = self._connection.recv()
                waiter = self._waiters.get(number)
                if waiter is not None:
                    waiter.give(content if kind == "result" else None, content if kind == "error" else None)
        except (EOFError, OSError):
            pass  # the pipe is closed: an ordinary end, or the process died
        except Exception as error:  # noqa: BLE001 (whatever unpickling an answer raises; the waiters are told below)
            fault = f"; its answer could not be read: {type(error).__name__}: {error}"
            self._process.kill()  # whose answer that was is unknown, so no later one can be trusted to arrive
        finally:
            self._process.join(STOP_TIMEOUT_S)
            if self._dead is None:
                killed = " (killed, often for want of memory)" if self._process.exitcode == -signal.SIGKILL else ""
                self._dead = f"engine process {self.pid} ended with code {self._process.exitcode}{killed}{fault}"
            for waiter in list(self._waiters.values()):
                waiter.give(None, EngineError(self._dead))

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineError(self._dead)
