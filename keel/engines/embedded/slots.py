"""What is in each slot: plain numpy columns, one row per slot, so that bookkeeping for all slots is a few operations.

A slot is FREE, HELD (a session waits in it for its next request), in PREFILL or in DECODE. Between passes a decoding
slot has fed every token it knows but the last one (`fed == known - 1`), or, just after a pass, all of them (`fed ==
known`: ready to draw); one that is made anew decodes tokens it knows already. What a free slot holds stays usable as a
beginning for others until the slot is taken again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keel.engines.base import DrawnSpan, GenerateRequest
from keel.types import Support

FREE, HELD, PREFILL, DECODE = range(4)
NO_TOKEN = -1


@dataclass
class Job:
    """A request on its way. `spans` lists (first token's place, policy version) of what was drawn."""

    request: GenerateRequest
    future: Any  # asyncio.Future[GenerateResult]
    seed_state: int
    slot: int = -1
    num_cached: int = 0
    spans: list[tuple[int, int]] = field(default_factory=list)
    old_routes: bytes = b""  # of positions num_cached to num_cached + num_old_routes - 1, fed before weights changed
    num_old_routes: int = 0
    support: list[np.ndarray] = field(default_factory=list)  # of each drawn token, if it is wanted; empty: nothing cut

    @property
    def num_prompt(self) -> int:
        return len(self.request.token_ids)


class SlotTable:
    """`rows` slots of `capacity` tokens; columns are indexed by slot."""

    def __init__(self, rows: int, capacity: int, kept_behind: int | None = None) -> None:
        """`kept_behind` as the cache says it; None: of every position a slot keeps all."""
        self.rows, self.capacity = rows, capacity
        self.kept_behind = capacity if kept_behind is None else kept_behind
        self.state = np.full(rows, FREE, dtype=np.int8)
        self.tokens = np.zeros((rows, capacity), dtype=np.int64)
        self.logprobs = np.zeros((rows, capacity), dtype=np.float64)
        self.known = np.zeros(rows, dtype=np.int64)  # tokens in `tokens`: prompt and drawn
        self.fed = np.zeros(rows, dtype=np.int64)  # tokens whose keys and values are in the cache
        self.goal = np.zeros(rows, dtype=np.int64)  # where the prefill under way ends
        self.written = np.zeros(rows, dtype=np.int64)  # positions written since position 0 was: `fed`, or more if cut
        self.end = np.zeros(rows, dtype=np.int64)  # `known` at which the length limit is reached
        self.shareable = np.zeros(rows, dtype=np.int64)  # first positions prefilled in chunks counted from 0
        self.planned = np.zeros(rows, dtype=np.int64)  # what `shareable` will be when the prefill is done
        self.epoch = np.full(rows, -1, dtype=np.int64)  # weights that the cached keys and values belong to
        self.serial = np.zeros(rows, dtype=np.int64)  # counts new beginnings, to notice that a slot was taken again
        self.temperature = np.ones(rows, dtype=np.float64)
        self.top_p = np.ones(rows, dtype=np.float64)
        self.top_k = np.zeros(rows, dtype=np.int64)
        self.seed_state = np.zeros(rows, dtype=np.uint64)
        self.stops = np.full((rows, 1), NO_TOKEN, dtype=np.int64)
        self.jobs: list[Job | None] = [None] * rows
        self.sessions: list[str] = [""] * rows

    def assign(self, slot: int, job: Job) -> None:
        """Put the request's tokens, limits and settings into the columns of `slot`."""
        request = job.request
        job.slot = slot
        self.jobs[slot] = job
        self.tokens[slot, : job.num_prompt] = request.token_ids
        self.known[slot] = job.num_prompt
        self.end[slot] = job.num_prompt + request.max_new_tokens
        self.temperature[slot] = request.sampling.temperature
        self.top_p[slot] = request.sampling.top_p
        self.top_k[slot] = request.sampling.top_k
        self.seed_state[slot] = job.seed_state
        missing = len(request.stop_token_ids) - self.stops.shape[1]
        if missing > 0:
            self.stops = np.pad(self.stops, ((0, 0), (0, missing)), constant_values=NO_TOKEN)
        self.stops[slot] = NO_TOKEN
        self.stops[slot, : len(request.stop_token_ids)] = request.stop_token_ids

    def continues(self, slot: int, token_ids: tuple[int, ...], epoch: int) -> bool:
        """Do these tokens begin with all that `slot` has cached, under the present weights, and go on?"""
        fed = int(self.fed[slot])
        if fed == 0 or self.epoch[slot] != epoch or len(token_ids) <= fed:
            return False
        return bool((self.tokens[slot, :fed] == token_ids[:fed]).all())

    def known_tokens(self, slot: int) -> tuple[int, ...]:
        return tuple(self.tokens[slot, : self.known[slot]].tolist())

    def common_beginning(
        self, token_ids: tuple[int, ...], epoch: int, favourite: int, step: int, without: Iterable[int] = ()
    ) -> tuple[int, int]:
        """The slot with the longest usable beginning of `token_ids`, and its length in whole steps; `favourite` wins a
        tie.

        Usable is what was, or is just being, prefilled from position 0 under the present weights: that is bit for bit
        what a prefill of `token_ids` would compute. It must not have been written over since.
        """
        length = len(token_ids)
        if length == 0:
            return favourite, 0
        different = self.tokens[:, :length] != np.asarray(token_ids)
        same = np.where(different.any(axis=1), different.argmax(axis=1), length)
        usable = np.minimum(same, self.planned) * (self.epoch == epoch)
        usable -= usable % step
        usable[self.written - usable > self.kept_behind] = 0
        usable[list(without)] = 0
        best = int(usable.argmax())
        if usable[favourite] == usable[best]:
            best = favourite
        return best, int(usable[best])

    def drawn_spans(self, job: Job) -> tuple[DrawnSpan, ...]:
        """What the job drew, cut where weights changed; spans without a token are left out."""
        slot = job.slot
        bounds = [start for start, _ in job.spans] + [int(self.known[slot])]
        return tuple(
            DrawnSpan(
                tuple(self.tokens[slot, start:stop].tolist()),
                tuple(self.logprobs[slot, start:stop].tolist()),
                version,
                _support(job, start, stop),
            )
            for (start, version), stop in zip(job.spans, bounds[1:], strict=True)
            if stop > start
        )


def _support(job: Job, start: int, stop: int) -> Support | None:
    """What the tokens at places `start` to `stop - 1` were chosen from; None unless the request wants to know."""
    if not job.request.return_support:
        return None
    parts = job.support[start - job.num_prompt : stop - job.num_prompt]
    return Support(tuple(map(len, parts)), b"".join(part.astype(np.uint32).tobytes() for part in parts))
