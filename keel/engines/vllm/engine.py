"""vLLM behind Keel's engine protocol."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from keel.config import EngineConfig, ModelConfig
from keel.config_vllm import LEAST_TEMPERATURE, MOST_TEMPERATURE
from keel.engines.base import (
    EngineCapabilities,
    EngineError,
    EngineHealth,
    GenerateRequest,
    GenerateResult,
    ScoreResult,
    WeightSource,
)
from keel.engines.embedded.checks import problem_with, refusal
from keel.engines.vllm.client import VllmClient
from keel.engines.vllm.command import find_python, is_cpu_build
from keel.engines.vllm.exchange import num_tops, read_answer, read_scores, request_body, result_of, score_body
from keel.engines.vllm.facts import ServerFacts, find_facts
from keel.engines.vllm.host import Host
from keel.engines.vllm.identity import check_server, push_problem, read_vocab_size, served_identity
from keel.engines.vllm.server import VllmServer
from keel.engines.vllm.sizes import check_cpu_sizes
from keel.engines.vllm.turns import Turns
from keel.sync.base import SyncError

T = TypeVar("T")


class VllmEngine:
    """Samples from a vLLM server; implements `keel.engines.base.Engine`.

    Made ready before the constructor returns: the server is healthy, and what it does is known (`facts`). It starts
    with the weights in `model.path`, as policy version `version`.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        *,
        max_sequence_tokens: int,
        version: int = 0,
        log_path: Path | None = None,
        model_overrides: Mapping[str, Any] | None = None,
    ) -> None:
        """Start a server for `model.path`, or attach to `config.vllm.url`.

        What a started one prints goes to `log_path` (if None a temporary file, gone after `close`); `model_overrides`
        are fields of the model's configuration that it takes otherwise. Raises EngineError if it does not come up,
        serves another model, another tokenizer or shorter sequences, returns no log-probs of what it draws, or if the
        model has sizes that vLLM's CPU build cannot run.
        """
        self._return_routes = config.return_routes
        remote = ("--trust-remote-code",) if model.trust_remote_code else ()
        revision = ("--revision", model.revision) if model.revision else ()
        settings = config.vllm.model_copy(update={"args": (*config.vllm.args, *remote, *revision)})
        self._config = settings
        self.capacity = config.max_sequence_tokens or max_sequence_tokens
        self._turns = Turns(settings.max_concurrency)
        self._numbers = itertools.count()
        self._sessions: dict[str, asyncio.Task[Any]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ended: set[asyncio.Task[Any]] = set()
        self._scratch = None if log_path or settings.url else Path(tempfile.mkdtemp(prefix="keel-vllm-log-"))
        kept = log_path or (self._scratch or Path()) / "vllm.log"

        if not settings.url and is_cpu_build(find_python(settings)):
            check_cpu_sizes(model)

        def start() -> VllmServer:
            return VllmServer.start(
                model.path,
                settings,
                dtype=model.dtype,
                max_sequence_tokens=self.capacity,
                log_path=kept,
                model_overrides=model_overrides,
            )

        server = None if settings.url else start()
        key = os.environ.get("VLLM_API_KEY", "") if server is None else ""
        address = settings.url if server is None else server.url
        client = VllmClient(address, timeout_s=settings.request_timeout_s, api_key=key)
        try:
            self.facts, self._label = apart(self._look_at(client, server, model, version))
            self.vocab_size = read_vocab_size(model)
            self._identity = served_identity(model, self.facts, settings, model_overrides or {})
        except BaseException:
            if server is not None:
                server.close()
            raise
        self.host = Host(
            client,
            server,
            None if server is None else start,
            version=version,
            max_restarts=settings.max_restarts,
            sleeps=self.facts.sleeps and server is not None,
        )

    # ---- the protocol

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Continue a sequence; see `GenerateRequest`. Raises EngineError if the server failed or this is closed."""
        self.host.check_open()
        problem = self._problem_with(request)
        if problem is not None:
            return refusal(request, problem)
        task = self._begin(self._draw(request))
        if request.session_id:
            self._sessions[request.session_id] = task
        try:
            result: GenerateResult | None = await self._outcome(task)
        finally:
            if self._sessions.get(request.session_id) is task:
                del self._sessions[request.session_id]
        if result is None:
            return GenerateResult(request.request_id, (), "abort", request.sampling)
        return result

    async def score(self, token_ids: tuple[int, ...]) -> ScoreResult:
        """Log-probs of a given sequence at temperature 1. Raises EngineError if it cannot be fed.

        One token is drawn after it, so it must be shorter than the engine's sequences.
        """
        self.host.check_open()
        if not 1 <= len(token_ids) < self.capacity or min(token_ids) < 0 or max(token_ids) >= self.vocab_size:
            raise EngineError(
                f"score: {len(token_ids)} tokens; it takes 1 to {self.capacity - 1}, each below {self.vocab_size}. "
                "Raise engine.max_sequence_tokens or score a shorter sequence"
            )
        result: ScoreResult | None = await self._outcome(self._begin(self._score(token_ids)))
        assert result is not None
        return result

    async def end_session(self, session_id: str) -> None:
        """End a request of the session that is still running, with "abort". The server keeps prefixes by their tokens,
        whoever sent them, so nothing else is held."""
        task = self._sessions.get(session_id)
        if task is not None:
            self._ended.add(task)
            task.cancel()

    async def load_weights(self, source: WeightSource, version: int) -> None:
        """Have the server's workers write the weights at `source`; draws from then on are of `version`.

        Requests under way are held, and go on with the new weights, with keys and values made anew. Raises SyncError,
        and nothing has changed, if the weights do not fit or this server must not be pushed to.
        """
        if source.kind not in self.capabilities().weight_sources:
            raise SyncError(
                f"vllm: no weights of kind {source.kind!r} can be pushed to {self.host.client.url}: "
                f"{push_problem(self.facts, self._config) or 'it takes ' + repr(self.capabilities().weight_sources)}"
            )
        await self.host.load(source, version)

    async def pause(self) -> None:
        await self.host.pause()

    async def resume(self) -> None:
        await self.host.resume()

    async def release_memory(self) -> None:
        """Forget keys and values. On CUDA, in a server started with --enable-sleep-mode, their memory is given back
        until the next request; on a CPU vLLM keeps it."""
        if self._turns.running or self._turns.waiting:
            raise EngineError("vllm: requests are under way; release_memory() is for an idle engine")
        await self.host.release_memory()

    def capabilities(self) -> EngineCapabilities:
        """`deterministic` only in vLLM's batch-invariant mode: otherwise what runs beside a request changes its
        roundings, and now and then a token, whatever its seed."""
        facts = self.facts
        problem = push_problem(facts, self._config)
        return EngineCapabilities(
            name="vllm",
            max_sequence_tokens=self.capacity,
            max_concurrency=self._config.max_concurrency,
            returns_routes=facts.returns_routes and self._return_routes,
            keeps_prefix=facts.keeps_prefix,
            shares_weights=False,
            weight_sources=() if problem else ("file", "gloo", *(() if facts.on_cpu else ("nccl",))),
            weight_problem=problem or "",
            weight_receivers=facts.num_workers,
            deterministic=facts.batch_invariant and facts.can_seed,
            cache_bytes=facts.cache_bytes,
            returns_support=facts.logprobs == "processed",
            identity=self._identity,
        )

    async def health(self) -> EngineHealth:
        """As seen from here, and whether the server says that it is well."""
        host, turns = self.host, self._turns
        try:
            host.check_open()
        except EngineError as error:
            return EngineHealth(False, host.version, 0, 0, str(error))
        ok = await host.client.is_healthy()
        detail = "" if ok else f"{host.client.url} does not answer"
        return EngineHealth(ok, host.version, turns.running, turns.waiting, detail)

    async def close(self) -> None:
        """Stop the server if it was started here. What runs fails with EngineError."""
        self.host.closed = True
        for task in tuple(self._tasks):
            task.cancel()
        await self.host.close()
        if self._scratch is not None:
            await asyncio.to_thread(shutil.rmtree, self._scratch, ignore_errors=True)

    # ---- requests

    def _problem_with(self, request: GenerateRequest) -> str | None:
        sampling = request.sampling
        if request.session_id in self._sessions:
            return f"session {request.session_id!r} is still busy with another request; await that first"
        if 0 < sampling.temperature < LEAST_TEMPERATURE or sampling.temperature > MOST_TEMPERATURE:
            return (
                f"temperature is {sampling.temperature}; vLLM draws at 0, or from {LEAST_TEMPERATURE} to "
                f"{MOST_TEMPERATURE}. Set one of these"
            )
        if self.facts.logprobs == "raw" and (sampling.is_cut or sampling.temperature not in (0.0, 1.0)):
            return (
                f"the server returns raw log-probs, which are not those of {sampling}; start it with --logprobs-mode "
                "processed_logprobs, or draw at temperature 1 with nothing cut"
            )
        return problem_with(
            request,
            max_sequence_tokens=self.capacity,
            vocab_size=self.vocab_size,
            can_route=self.facts.returns_routes,
        )

    async def _draw(self, request: GenerateRequest) -> GenerateResult:
        facts = self.facts
        tops = num_tops(
            request.sampling,
            wanted=request.return_support,
            has_masks=facts.returns_masks,
            max_logprobs=facts.max_logprobs,
            vocab_size=self.vocab_size,
        )

        async def question(client: VllmClient) -> dict[str, Any]:
            body = request_body(
                request,
                facts.dialect,
                model=self._model_name(),
                request_id=self._new_id(request.request_id),
                num_tops=tops,
                seeded=facts.can_seed,
            )
            return await (client.generate(body) if facts.dialect == "generate" else client.complete(body))

        async with self._turns.take():
            answer = await self.host.ask(question)
        read = read_answer(answer, facts.dialect)
        return result_of(request, read, version_of=self._version_of, vocab_size=self.vocab_size)

    async def _score(self, token_ids: tuple[int, ...]) -> ScoreResult:
        dialect = self.facts.dialect

        async def question(client: VllmClient) -> tuple[dict[str, Any], int]:
            body = score_body(token_ids, dialect, model=self._model_name(), request_id=self._new_id("score"))
            answer = await (client.generate(body) if dialect == "generate" else client.complete(body))
            return answer, self.host.version

        async with self._turns.take():
            while True:
                before = self.host.version
                answer, after = await self.host.ask(question)
                if before == after:  # else weights changed on the way
                    return ScoreResult(read_scores(answer, token_ids), None, after)

    def _begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _outcome(self, task: asyncio.Task[T]) -> T | None:
        """What `task` returns; None if its session was ended. Cancelling this cancels it, and the server aborts."""
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise
        ended = task in self._ended
        self._ended.discard(task)
        if task.cancelled():
            if ended and not self.host.closed:
                return None
            raise EngineError("vllm: the engine is closed")
        return task.result()

    def _new_id(self, request_id: str) -> str:
        """One per question asked: a server that is asked again must not take it for the same request."""
        return f"{request_id}#{os.getpid()}-{next(self._numbers)}"

    def _model_name(self) -> str:
        server = self.host.server
        return self.facts.model if server is None else server.name

    def _version_of(self, label: str | None) -> int:
        """The policy version that the server's name of its weights stands for."""
        if label is None or (label == self._label and self.host.restarts == 0):
            return self.host.version
        if not label.isdecimal():
            raise EngineError(
                f"vllm: tokens were drawn from weights {label!r}, which Keel did not push; does somebody else update "
                f"the server at {self.host.client.url}?"
            )
        return int(label)

    async def _look_at(
        self, client: VllmClient, server: VllmServer | None, model: ModelConfig, version: int
    ) -> tuple[ServerFacts, str | None]:
        """What the server does, checked against what the run needs, and what it calls its weights."""
        try:
            facts = await find_facts(client, served_name="" if server is None else server.name)
            await check_server(client, facts, model, self.capacity, self._config)
            label = None
            if facts.tells and (server is not None or self._config.allow_weight_push):
                await client.set_weight_version(str(version))
            elif facts.tells:
                label = await client.weight_version()
            return facts, label
        finally:
            await client.close()


def apart(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end on a loop of its own, in a thread of its own: whoever calls may be on a running loop."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
