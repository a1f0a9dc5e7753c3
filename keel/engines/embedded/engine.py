"""The engine's face: requests in, results out, one driver that runs passes while there is work.

Everything happens on the caller's event loop. The driver gives the loop a turn after every pass, so that environments
and tools go on; whatever arrives in a turn is admitted together before the next pass. The driver is a task that lives
only while there is work, so the engine may be used from one event loop after another.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import torch

from keel.engines.base import (
    EngineCapabilities,
    EngineError,
    EngineHealth,
    GenerateRequest,
    GenerateResult,
    ScoreResult,
    WeightSource,
)
from keel.engines.embedded.cache import SlotCache
from keel.engines.embedded.checks import problem_with, refusal
from keel.engines.embedded.passes import ROW_MULTIPLE, Passes, evaluation_mode, whole_rows
from keel.engines.embedded.results import as_routes, keep_routes, result_of
from keel.engines.embedded.sampling import draw, seed_state, uniforms
from keel.engines.embedded.scheduler import Scheduler
from keel.engines.embedded.scoring import Scorer
from keel.engines.embedded.slots import Job, SlotTable
from keel.ops.attention.exact import KEY_BLOCK
from keel.ops.numerics import TILE_ROWS
from keel.sync.transports import TIMEOUT_S, read_weights, receive_weights
from keel.types import FinishReason

if TYPE_CHECKING:
    from keel.config import EngineConfig
    from keel.models.policy import PolicyModel

SHORT_CHUNK, LONG_CHUNK = 8, 32
LONG_CAPACITY = 512
"""Prefill chunks have `SHORT_CHUNK` rows up to this capacity, where more of a prompt can be shared, and beyond it
`LONG_CHUNK`, because each chunk reads its sequence's cache."""


class EmbeddedEngine:
    """Samples from `policy`'s own modules with a key-value cache of its own; implements `keel.engines.base.Engine`.

    A request's tokens, log-probs and routes are the same to the bit whatever runs beside it, in whatever slot, in
    whatever order requests arrive and however long tools take, as long as slots, prefill tile and thread count
    stay the same. `shares_weights` says that `policy` is the learner's own module: then new weights are there already
    and `load_weights` only takes note. Otherwise they are read from a file into its parameters, in place.
    """

    def __init__(
        self,
        policy: PolicyModel,
        config: EngineConfig,
        *,
        max_sequence_tokens: int,
        version: int = 0,
        shares_weights: bool = True,
    ) -> None:
        """`max_sequence_tokens` (unless the config has its own) is the capacity of a slot, prompt and reply together.

        Raises EngineError if the model has fewer positions than that.
        """
        info = policy.info
        self.capacity = config.max_sequence_tokens or max_sequence_tokens
        if info.max_positions and self.capacity > info.max_positions:
            raise EngineError(
                f"engine: {self.capacity} tokens per sequence, but the model has {info.max_positions} positions; "
                "lower engine.max_sequence_tokens or rollout.max_sequence_tokens"
            )
        self.policy = policy
        self.num_slots = config.slots
        self.shares_weights = shares_weights
        parameter = next(policy.parameters())
        multiple = TILE_ROWS if policy.exact else ROW_MULTIPLE
        rows = whole_rows(config.slots, multiple)
        chunk = SHORT_CHUNK if self.capacity <= LONG_CAPACITY else LONG_CHUNK
        tile_rows = whole_rows(config.prefill_tile, multiple)
        most_rows = 2 * tile_rows  # of a pass that need not have the same number of rows every time
        tile_chunks = max(1, most_rows // SHORT_CHUNK)
        self._dense = info.num_moe_layers == 0
        with_routes = config.return_routes and not self._dense
        self._cache = SlotCache.allocate(
            rows,
            whole_rows(self.capacity, KEY_BLOCK) if policy.exact else self.capacity,
            layer_windows=info.layer_windows,
            pass_rows=most_rows,
            num_kv_heads=info.num_kv_heads,
            head_dim=info.head_dim,
            route_shape=(info.num_moe_layers, info.top_k) if with_routes else None,
            dtype=parameter.dtype,
            device=parameter.device,
        )
        self._table = SlotTable(rows, self.capacity, self._cache.kept_behind)
        self._passes = Passes(policy, self._cache, self._table, most_rows, chunk, tile_chunks)
        if self._passes.row_step == 0:
            self._passes.tile_rows = most_rows = tile_rows
        self._scheduler = Scheduler(
            self._table, config.slots, chunk, most_rows, tile_chunks, full_rows=min(tile_rows, most_rows)
        )
        self._scheduler.version = version
        self._driver: asyncio.Task[None] | None = None
        self._scorer = Scorer(policy, self._passes, lambda: self._scheduler.epoch)
        self._paused = False
        self._failure: str | None = None
        self._closed = False
        self.num_drawn = 0

    # ---- the protocol

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """Continue a sequence; see `GenerateRequest`. Raises EngineError if the engine failed or is closed."""
        self._check_alive()
        problem = problem_with(
            request,
            max_sequence_tokens=self.capacity,
            vocab_size=self.policy.info.vocab_size,
            can_route=self._dense or self._cache.routes is not None,
        )
        if problem is None and request.session_id and self._scheduler.find(request.session_id) is not None:
            problem = f"session {request.session_id!r} is still busy with another request; await that first"
        if problem is not None:
            return refusal(request, problem)
        job = Job(request, asyncio.get_running_loop().create_future(), seed_state(request.seed))
        self._scheduler.submit(job)
        self._wake()
        try:
            result: GenerateResult = await job.future
        except asyncio.CancelledError:
            self._abandon(job)
            raise
        return result

    async def score(self, token_ids: tuple[int, ...]) -> ScoreResult:
        """Log-probs of a given sequence at temperature 1, and its routes. Raises EngineError if it cannot be fed.

        One sequence at a time; restarted if weights change on the way.
        """
        self._check_alive()
        top = self.policy.info.vocab_size
        if not 1 <= len(token_ids) <= self.capacity or min(token_ids) < 0 or max(token_ids) >= top:
            raise EngineError(
                f"score: {len(token_ids)} tokens; it takes 1 to {self.capacity}, each below {top}. "
                "Raise engine.max_sequence_tokens or score a shorter sequence"
            )
        logprobs, routes = await self._scorer.score(np.asarray(token_ids, dtype=np.int64))
        self._check_alive()
        return ScoreResult(logprobs, as_routes(routes, len(token_ids), self._cache), self._scheduler.version)

    async def end_session(self, session_id: str) -> None:
        """Free what the session holds; a request of it that is still running ends with "abort"."""
        job = self._scheduler.find(session_id)
        if job is not None:
            self._settle(job, "abort")
            self._abandon(job)
        self._scheduler.end_session(session_id)
        if self._scheduler.num_waiting():
            self._wake()

    async def load_weights(self, source: WeightSource, version: int) -> None:
        """Sample from new weights, as policy version `version`, from the next pass on.

        Keys and values of the old ones count no more: sessions feed their tokens again when they continue, requests
        under way at once. Raises EngineError for a kind of source this engine does not take, SyncError for weights that
        do not fit (nothing has changed then).
        """
        self._check_alive()
        if source.kind not in self.capabilities().weight_sources:
            raise EngineError(
                f"load_weights: this engine takes {self.capabilities().weight_sources}, got {source.kind!r} "
                f"({'it shares' if self.shares_weights else 'it does not share'} the learner's storage)"
            )
        own = self.policy.trained_parameters()
        if source.kind == "file":
            read_weights(source.location, own)
        elif source.kind == "gloo":
            received = await asyncio.to_thread(receive_weights, source.location, own, timeout_s=TIMEOUT_S)
            with torch.no_grad():
                for name, target in own.items():
                    target.copy_(received[name])
        for job in self._scheduler.jobs():
            keep_routes(job, self._table, self._cache)
            if job.slot >= 0:
                self._cache.wipe(job.slot)
        self._scheduler.invalidate(version)

    async def pause(self) -> None:
        """No pass runs until `resume`; requests are taken and wait."""
        self._paused = True

    async def resume(self) -> None:
        self._paused = False
        self._wake()

    async def release_memory(self) -> None:
        """Give the storage of keys and values back; the next request takes it again, and sessions feed theirs anew.

        Raises EngineError while requests run or wait.
        """
        self._check_alive()
        scheduler = self._scheduler
        busy = scheduler.num_running() + scheduler.num_waiting() + self._scorer.is_busy
        if busy:
            raise EngineError(f"release_memory: {busy} request(s) are under way; wait for them, or end their sessions")
        scheduler.invalidate(scheduler.version)
        self._cache.release()
        if not self.shares_weights and self._passes.device.type == "cuda":
            torch.cuda.empty_cache()  # the learner may be another process, which cannot use what this one keeps

    def capabilities(self) -> EngineCapabilities:
        return EngineCapabilities(
            name="embedded",
            max_sequence_tokens=self.capacity,
            max_concurrency=self.num_slots,
            returns_routes=self._cache.routes is not None,
            keeps_prefix=True,
            shares_weights=self.shares_weights,
            weight_sources=("shared",) if self.shares_weights else ("file", "gloo"),
            deterministic=True,
            cache_bytes=self._cache.num_bytes,
            returns_support=True,
        )

    async def health(self) -> EngineHealth:
        scheduler = self._scheduler
        detail = self._failure or ("closed" if self._closed else "paused" if self._paused else "")
        ok = self._failure is None and not self._closed
        return EngineHealth(ok, scheduler.version, scheduler.num_running(), scheduler.num_waiting(), detail)

    async def close(self) -> None:
        """Abort what runs and refuse what comes."""
        self._closed = True
        self._fail_all(EngineError("the engine was closed"))
        driver, self._driver = self._driver, None
        if driver is not None and not driver.done() and driver.get_loop() is asyncio.get_running_loop():
            driver.cancel()
            await asyncio.gather(driver, return_exceptions=True)

    def statistics(self) -> dict[str, int]:
        """Counts since the start: passes of each kind (`lean_passes` are of both), tokens drawn, prompt tokens copied
        or left in place, tokens fed again because an idle session had given its slot up."""
        passes = self._passes.num_passes
        return {
            "decode_passes": passes["decode"],
            "prefill_passes": passes["prefill"],
            "lean_passes": passes["lean"],
            "remade_tokens": self._scheduler.num_remade,
            "drawn_tokens": self.num_drawn,
            "shared_tokens": self._scheduler.num_shared,
            "cache_bytes": self._cache.num_bytes,
        }

    # ---- the driver

    def _wake(self) -> None:
        if not self._paused and (self._driver is None or self._driver.done()):
            self._driver = asyncio.get_running_loop().create_task(self._drive())

    async def _drive(self) -> None:
        with evaluation_mode(self.policy):
            while not self._paused and self._iterate():  # noqa: ASYNC110  (gives the loop a turn; polls nothing)
                await asyncio.sleep(0)

    def _iterate(self) -> bool:
        """Admit, prefill, decode, draw once; False if there was nothing to do. A failure fails every request."""
        try:
            return self._iterate_once()
        except Exception as error:  # noqa: BLE001  (whatever torch raises: nobody may wait for ever)
            self._failure = f"{type(error).__name__}: {error}"
            self._fail_all(EngineError(f"the engine failed: {self._failure}"), cause=error)
            return False

    def _iterate_once(self) -> bool:
        scheduler = self._scheduler
        scheduler.admit()
        prefilled = self._prefill()
        active = scheduler.decoding()
        hidden = None
        if active.any():
            hidden = self._passes.decode(active)
            scheduler.decode_done(active)
        if hidden is None and not prefilled:
            return False
        self._draw(hidden, prefilled)
        return True

    def _prefill(self) -> list[tuple[list[int], torch.Tensor]]:
        """Run the prefill passes that are due: (slots whose prompt is complete, their hidden states) of each."""
        scheduler = self._scheduler
        done: list[tuple[list[int], torch.Tensor]] = []
        while True:
            for copy in scheduler.take_copies():
                self._cache.copy_prefix(copy.source, copy.targets, copy.length)
            chunks = scheduler.next_tile()
            if not chunks:
                return done
            hidden = self._passes.prefill(chunks)
            complete = scheduler.tile_done(chunks)
            last = [index for index, chunk in enumerate(chunks) if chunk.last and chunk.slot in complete]
            done.append((complete, hidden[last]))

    def _draw(self, hidden: torch.Tensor | None, prefilled: list[tuple[list[int], torch.Tensor]]) -> None:
        """Draw a token for every slot that is ready; finish what is over."""
        table, scheduler = self._table, self._scheduler
        if hidden is None:
            hidden = prefilled[0][1].new_zeros(table.rows, prefilled[0][1].shape[1])
        for slots, states in prefilled:
            hidden[slots] = states
        ready = scheduler.ready()
        if not ready.any():
            return
        rows = np.flatnonzero(ready)
        uniform = uniforms(table.seed_state[rows], table.known[rows])
        wanted = np.flatnonzero(np.isin(rows, scheduler.support_rows(rows.tolist()))).tolist()
        settings = (table.temperature[rows], table.top_k[rows], table.top_p[rows])
        logits = self._passes.logits(hidden[torch.from_numpy(rows).to(hidden.device)])
        draws = draw(logits, *settings, uniform, wanted, exact=self.policy.exact).of_rows(rows, table.rows)
        self.num_drawn += int(ready.sum())
        for ended in scheduler.take_draws(ready, draws):
            self._settle(ended.job, ended.reason)
            if ended.reason == "error":
                self._abandon(ended.job)
            else:
                scheduler.finish(ended.job)

    def _settle(self, job: Job, reason: FinishReason) -> None:
        """Give the job's future its result."""
        if not job.future.done():
            version = self._scheduler.version
            job.future.set_result(result_of(job, reason, self._table, self._cache, version))

    # ---- failure

    def _abandon(self, job: Job) -> None:
        """Forget a job and what it held. Its cache was not (or wrongly) proved finite by a draw, so it is wiped."""
        if job.slot >= 0 and self._table.jobs[job.slot] is job:
            self._scheduler.forget(job.slot)
            self._cache.wipe(job.slot)
        self._scheduler.drop(job)

    def _check_alive(self) -> None:
        if self._closed:
            raise EngineError("the engine was closed")
        if self._failure is not None:
            raise EngineError(f"the engine failed earlier: {self._failure}")

    def _fail_all(self, error: EngineError, cause: BaseException | None = None) -> None:
        error.__cause__ = cause
        for job in self._scheduler.jobs():
            self._scheduler.drop(job)
            if not job.future.done():
                job.future.set_exception(error)
