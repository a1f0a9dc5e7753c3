"""Log-probs of given sequences, in a cache slot of their own, beside whatever is being generated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from keel.engines.base import EngineError
from keel.engines.embedded.passes import Passes, evaluation_mode
from keel.engines.embedded.sampling import logprobs_of

if TYPE_CHECKING:
    from keel.models.policy import PolicyModel


class Scorer:
    """Scores one sequence at a time, tile by tile, giving the event loop a turn after each."""

    def __init__(self, policy: PolicyModel, passes: Passes, epoch: Callable[[], int]) -> None:
        """`epoch()` changes when weights do; a sequence scored across a change is scored again."""
        self._policy, self._passes, self._epoch = policy, passes, epoch
        self._queue: list[asyncio.Future[None]] = []

    @property
    def is_busy(self) -> bool:
        """Is a sequence being scored, or waiting to be?"""
        return bool(self._queue)

    async def score(self, token_ids: np.ndarray) -> tuple[tuple[float, ...], bytes]:
        """Log-probs `[n - 1]` at temperature 1 of `token_ids [n]`, and the routes of all n tokens (raw bytes).

        Raises EngineError if a log-prob is not finite.
        """
        cache = self._passes.cache
        place = await self._take_slot()
        clean = False
        try:
            logprobs = await self._run(token_ids)
            clean = bool(np.isfinite(logprobs).all())
            if not clean:
                raise EngineError(f"score: logits were not finite at position {int((~np.isfinite(logprobs)).argmax())}")
            return tuple(logprobs.tolist()), cache.read_routes(cache.score_slot, 0, len(token_ids))
        finally:
            if not clean:  # cancelled or not finite: the next sequence must find nothing that poisons it
                cache.wipe(cache.score_slot)
            self._leave_slot(place)

    async def _run(self, token_ids: np.ndarray) -> np.ndarray:
        parts: list[np.ndarray] = []
        start, epoch = 0, self._epoch()
        while start < len(token_ids):
            stop = min(start + self._passes.tile_rows, len(token_ids))
            with evaluation_mode(self._policy):
                hidden = self._passes.score_tile(token_ids[start:stop], start)
                labels = torch.from_numpy(token_ids[start + 1 : stop + 1]).to(hidden.device)
                parts.append(logprobs_of(self._passes.logits(hidden)[: len(labels)], labels, exact=self._policy.exact))
            start = stop
            await asyncio.sleep(0)
            if self._epoch() != epoch:
                self._passes.cache.wipe(self._passes.cache.score_slot)
                parts, start, epoch = [], 0, self._epoch()
        return np.concatenate(parts)

    async def _take_slot(self) -> asyncio.Future[None]:
        """Wait until nobody scores. (asyncio.Lock would tie the engine to one event loop.)"""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(mine)
        if self._queue[0] is not mine:
            try:
                await mine
            except asyncio.CancelledError:
                self._leave_slot(mine)
                raise
        return mine

    def _leave_slot(self, mine: asyncio.Future[None]) -> None:
        was_first = self._queue[0] is mine
        self._queue.remove(mine)
        if was_first and self._queue and not self._queue[0].done():
            self._queue[0].set_result(None)
