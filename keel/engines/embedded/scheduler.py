"""Who gets a slot, what the next pass feeds, and when a request is over. No tensors: numpy and plain values.

Nothing here may change a result, only when it is computed: a request's chunks are cut by its own positions, and copies
of a common beginning are taken at chunk boundaries of a prefill that started at position 0, so that a copy holds
the bits that a prefill of its own would have computed.

Sessions keep their slots between requests as long as nobody needs them. Where somebody does, the session that has been
idle longest gives its slot up. When it returns, its past is made anew in the steps in which it was made: prompts in the
same chunks, drawn tokens one by one, so that what it draws next has the bits that it would have had.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keel.engines.embedded.sampling import Draws
from keel.engines.embedded.slots import DECODE, FREE, HELD, PREFILL, Job, SlotTable
from keel.types import FinishReason

_NOTHING_CUT = np.empty(0, dtype=np.int64)

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Chunk:
    """Positions `start` to `stop - 1` of `slot`; `last` ends what the slot has to prefill."""

    slot: int
    start: int
    stop: int
    last: bool


@dataclass(frozen=True)
class Copy:
    """Slot `source` already holds the first `length` positions that `targets` need."""

    source: int
    length: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Ended:
    """A job that drew its last token; `reason` "error" means that its logits were not finite."""

    job: Job
    reason: FinishReason


@dataclass(frozen=True)
class _Wish:
    source: int
    serial: int
    length: int


@dataclass(frozen=True)
class _Past:
    """What a session had fed when it gave its slot up, and where prefill and decoding took turns: see `_history`."""

    token_ids: npt.NDArray[np.int64]
    bounds: tuple[int, ...]

    def begins(self, token_ids: tuple[int, ...]) -> bool:
        """Do these tokens begin with it, and go on?"""
        count = len(self.token_ids)
        return len(token_ids) > count and bool((self.token_ids == token_ids[:count]).all())


class Scheduler:
    """Sessions to slots, first come first served; continuous batching."""

    def __init__(
        self,
        table: SlotTable,
        num_slots: int,
        chunk: int,
        tile_rows: int,
        tile_chunks: int,
        *,
        full_rows: int | None = None,
    ) -> None:
        """A prefill pass has up to `tile_rows` rows, of at most `tile_chunks` chunks of up to `chunk` rows each; with
        `full_rows` (None: all) it is full enough to run at once."""
        self.table = table
        self.full_rows = tile_rows if full_rows is None else full_rows
        self.num_slots, self.chunk, self.tile_rows, self.tile_chunks = num_slots, chunk, tile_rows, tile_chunks
        self.epoch = 0
        self.version = 0
        self.waiting: deque[Job] = deque()
        self.slot_of: dict[str, int] = {}
        self._arrived: list[Job] = []
        self._free: deque[int] = deque(range(num_slots))
        self._prefill_order: list[int] = []
        self._wishes: dict[int, _Wish] = {}
        self._idle_rows = 0
        self._idle: dict[int, None] = {}  # slots of sessions at rest, the one that has been longest first
        self._history: dict[int, list[int]] = {}  # of each slot the places where a prefill or a decoding ended, in turn
        self._to_remake: dict[int, list[int]] = {}  # of such places, those that a slot has yet to come to
        self._pasts: dict[str, _Past] = {}
        self.num_shared = 0
        self.num_remade = 0

    # ---- requests in

    def submit(self, job: Job) -> None:
        """Take a request; it starts at the next `admit`."""
        self._arrived.append(job)

    def admit(self) -> None:
        """Start all that can start: requests of sessions that hold a slot, then others, in slots free or given up."""
        arrived, self._arrived = self._arrived, []
        for job in arrived:
            slot = self.slot_of.get(job.request.session_id)
            if slot is None:
                self.waiting.append(job)
            else:
                self._start(slot, job)
        while self.waiting and (self._free or self._idle):
            if not self._free:
                self._give_up(next(iter(self._idle)))
            job = self.waiting.popleft()
            slot = self._free.popleft()
            self.table.sessions[slot] = job.request.session_id
            if job.request.session_id:
                self.slot_of[job.request.session_id] = slot
            self._start(slot, job)

    def is_busy(self, session_id: str) -> bool:
        """Is a request of this session running or waiting?"""
        slot = self.slot_of.get(session_id)
        if slot is not None and self.table.jobs[slot] is not None:
            return True
        return any(job.request.session_id == session_id for job in (*self._arrived, *self.waiting))

    def find(self, session_id: str) -> Job | None:
        """The session's request, if one is running or waiting."""
        slot = self.slot_of.get(session_id)
        if slot is not None and self.table.jobs[slot] is not None:
            return self.table.jobs[slot]
        return next((job for job in (*self._arrived, *self.waiting) if job.request.session_id == session_id), None)

    def _start(self, slot: int, job: Job) -> None:
        table = self.table
        self._idle.pop(slot, None)
        past = self._pasts.pop(job.request.session_id, None)
        job.spans = [(job.num_prompt, self.version)]
        if table.state[slot] == HELD and table.continues(slot, job.request.token_ids, self.epoch):
            job.num_cached = int(table.fed[slot])
            table.assign(slot, job)
            table.planned[slot] = table.shareable[slot]
            self._prefill(slot, job.num_prompt)
            return
        again: tuple[int, ...] = ()
        if past is not None and past.begins(job.request.token_ids):
            again = past.bounds
            job.num_cached = len(past.token_ids)  # as if it had been kept: a request is not to see its neighbours
            self.num_remade += job.num_cached
        self._begin(slot, job.request.token_ids, again=again)
        table.serial[slot] += 1
        table.assign(slot, job)

    def _begin(
        self, slot: int, token_ids: tuple[int, ...], *, again: tuple[int, ...] = (), without: Iterable[int] = ()
    ) -> None:
        """Prefill `slot` from position 0, or from where a copy of another slot's beginning (not `without`'s) ends.

        `again` are the places at which what is made anew changes between prefill and decoding, the first prefill's end
        being the first. A slot that still waits for its own copy may be waited for, but only by one that starts after
        it: so nobody waits in a circle.
        """
        table = self.table
        goal = again[0] if again else len(token_ids)
        table.planned[slot] = table.shareable[slot]
        source, length = table.common_beginning(
            token_ids[: goal - 1], self.epoch, favourite=slot, step=self.chunk, without=without
        )
        kept = length if source == slot else 0
        self.num_shared += kept
        table.epoch[slot] = self.epoch
        table.fed[slot] = table.shareable[slot] = kept
        if kept == 0:
            table.written[slot] = 0
        table.planned[slot] = goal
        self._history[slot] = []
        self._to_remake[slot] = list(again[1:])
        self._prefill(slot, goal)
        self._wishes.pop(slot, None)
        if length > kept:
            self._wishes[slot] = _Wish(source, int(table.serial[source]), length)

    def _prefill(self, slot: int, goal: int) -> None:
        self.table.state[slot] = PREFILL
        self.table.goal[slot] = goal
        self._prefill_order.append(slot)

    def _give_up(self, slot: int) -> None:
        """Take the slot of a session at rest, and remember how what it holds was made."""
        session, fed = self.table.sessions[slot], int(self.table.fed[slot])
        if self.table.epoch[slot] == self.epoch:
            self._pasts[session] = _Past(self.table.tokens[slot, :fed].copy(), tuple(self._history[slot]))
        self._free_slot(slot)

    # ---- prefill

    def take_copies(self) -> list[Copy]:
        """Copies whose source is ready; the slots count as prefilled that far. A source that is gone is replaced."""
        table = self.table
        due: dict[tuple[int, int], list[int]] = {}
        for slot, wish in list(self._wishes.items()):
            ready = table.shareable[wish.source] >= wish.length
            coming = not ready and table.state[wish.source] == PREFILL
            ready &= table.written[wish.source] - wish.length <= table.kept_behind
            if table.serial[wish.source] != wish.serial or not (ready or coming):
                del self._wishes[slot]
                self._prefill_order.remove(slot)
                again = (int(table.goal[slot]), *self._to_remake[slot]) if self._to_remake[slot] else ()
                self._begin(slot, table.known_tokens(slot), again=again, without=tuple(self._wishes))
            elif ready:
                del self._wishes[slot]
                due.setdefault((wish.source, wish.length), []).append(slot)
        for (source, length), targets in due.items():
            table.fed[targets] = table.shareable[targets] = length
            table.written[targets] = table.written[source]
            self.num_shared += length * len(targets)
        return [Copy(source, length, tuple(targets)) for (source, length), targets in due.items()]

    def next_tile(self) -> list[Chunk]:
        """Chunks for one prefill pass, or none if it is better (or necessary) to decode first.

        A full tile runs at once. A tile with unused rows waits until decode passes have left as many rows idle for
        want of these prompts: then waiting has cost what running early would have (the rent-or-buy rule).
        """
        chunks = self._next_chunks()
        unused_rows = self.full_rows - sum(chunk.stop - chunk.start for chunk in chunks)
        if not chunks or (self._idle_rows < unused_rows and bool((self.table.state == DECODE).any())):
            return []
        self._idle_rows = 0
        return chunks

    def _next_chunks(self) -> list[Chunk]:
        """As many chunks as fit a tile, first come first served."""
        chunks: list[Chunk] = []
        rows_left = self.tile_rows
        for slot in self._prefill_order:
            if slot in self._wishes:
                continue
            start, goal = int(self.table.fed[slot]), int(self.table.goal[slot])
            while start < goal:
                stop = min(start + self.chunk, goal)
                if stop - start > rows_left or len(chunks) == self.tile_chunks:
                    return chunks
                chunks.append(Chunk(slot, start, stop, stop == goal))
                rows_left -= stop - start
                start = stop
        return chunks

    def tile_done(self, chunks: list[Chunk]) -> list[int]:
        """Note that `chunks` are in the cache; the slots whose prompt is complete, in the order of last chunks."""
        table = self.table
        complete = []
        for chunk in chunks:
            slot = chunk.slot
            table.fed[slot] = chunk.stop
            table.written[slot] = max(table.written[slot], chunk.stop)
            if table.planned[slot] > table.shareable[slot]:
                table.shareable[slot] = chunk.stop
            if chunk.last:
                table.state[slot] = DECODE
                self._prefill_order.remove(slot)
                self._history[slot].append(chunk.stop)
                complete += [slot] if chunk.stop == table.known[slot] else []
                self._turn_back(slot)
        return complete

    def _turn_back(self, slot: int) -> None:
        """Prefill again, if `slot` has decoded what it had drawn when its past was made."""
        places = self._to_remake[slot]
        if places and self.table.state[slot] == DECODE and self.table.fed[slot] == places[0]:
            self._history[slot].append(places.pop(0))
            self._prefill(slot, places.pop(0) if places else int(self.table.known[slot]))

    # ---- decode

    def decoding(self) -> Flags:
        """[rows] bool: slots that have one token to feed."""
        table = self.table
        return np.asarray((table.state == DECODE) & (table.fed < table.known), dtype=np.bool_)

    def decode_done(self, active: Flags) -> None:
        """Note that one more token of the `active` slots is in the cache."""
        table = self.table
        table.fed += active
        np.maximum(table.written, table.fed, out=table.written, where=active)
        self._idle_rows += len(self._prefill_order)
        for slot in [slot for slot, places in self._to_remake.items() if places]:
            self._turn_back(slot)

    def ready(self) -> Flags:
        """[rows] bool: slots whose next token can be drawn."""
        table = self.table
        return np.asarray((table.state == DECODE) & (table.fed == table.known), dtype=np.bool_)

    def support_rows(self, slots: Iterable[int]) -> list[int]:
        """Those of `slots` whose request wants to know what each token was chosen from."""
        jobs = self.table.jobs
        return [slot for slot in slots if (job := jobs[slot]) is not None and job.request.return_support]

    def take_draws(self, ready: Flags, draws: Draws) -> list[Ended]:
        """Append the drawn tokens of the `ready` slots; the jobs that are over. Their slots stay as they are."""
        table = self.table
        rows = np.flatnonzero(ready & draws.finite)
        places = table.known[rows]
        tokens = draws.tokens[rows]
        table.tokens[rows, places] = tokens
        table.logprobs[rows, places] = draws.logprobs[rows]
        table.known[rows] = places + 1
        for row in self.support_rows(rows.tolist()):
            job = table.jobs[row]
            assert job is not None
            job.support.append(draws.support.get(row, _NOTHING_CUT))
        stopped = (table.stops[rows] == tokens[:, None]).any(axis=1)
        over = stopped | (places + 1 >= table.end[rows])
        ended = [self._ended(int(rows[i]), "stop" if stopped[i] else "length") for i in np.flatnonzero(over)]
        return ended + [self._ended(int(slot), "error") for slot in np.flatnonzero(ready & ~draws.finite)]

    def _ended(self, slot: int, reason: FinishReason) -> Ended:
        job = self.table.jobs[slot]
        assert job is not None, f"slot {slot} drew a token for nobody"
        return Ended(job, reason)

    # ---- requests out

    def finish(self, job: Job) -> None:
        """The job is over: its session keeps the slot; without a session the slot is free."""
        slot = job.slot
        self.table.jobs[slot] = None
        if job.request.session_id:
            self.table.state[slot] = HELD
            self._history[slot].append(int(self.table.fed[slot]))
            self._idle[slot] = None
        else:
            self._free_slot(slot)

    def drop(self, job: Job) -> None:
        """Forget a job wherever it is, with its session and slot."""
        if job.slot >= 0 and self.table.jobs[job.slot] is job:
            self._free_slot(job.slot)
        elif job in self.waiting:
            self.waiting.remove(job)
            self.end_session(job.request.session_id)
        elif job in self._arrived:
            self._arrived.remove(job)
            self.end_session(job.request.session_id)

    def end_session(self, session_id: str) -> None:
        """Free the session's slot; unknown sessions are nobody's."""
        self._pasts.pop(session_id, None)
        slot = self.slot_of.get(session_id)
        if slot is not None:
            self._free_slot(slot)

    def forget(self, slot: int) -> None:
        """What the slot holds is not to be copied (it is about to be wiped)."""
        self.table.shareable[slot] = self.table.planned[slot] = 0
        self.table.serial[slot] += 1

    def _free_slot(self, slot: int) -> None:
        table = self.table
        if slot in self._prefill_order:
            self._prefill_order.remove(slot)
        self._wishes.pop(slot, None)
        self._idle.pop(slot, None)
        self._to_remake[slot] = []
        self.slot_of.pop(table.sessions[slot], None)
        table.sessions[slot] = ""
        table.jobs[slot] = None
        table.state[slot] = FREE
        table.planned[slot] = table.shareable[slot]
        self._free.append(slot)

    def jobs(self) -> list[Job]:
        """Every job there is: running by slot, then waiting by arrival."""
        return [job for job in (*self.table.jobs, *self.waiting, *self._arrived) if job is not None]

    def num_running(self) -> int:
        return sum(job is not None for job in self.table.jobs)

    def num_waiting(self) -> int:
        return len(self.waiting) + len(self._arrived)

    def invalidate(self, version: int) -> None:
        """Weights changed: nothing cached counts any more. Running jobs feed again all they know and go on."""
        self.epoch += 1
        self.version = version
        self._prefill_order.clear()
        self._wishes.clear()
        self._pasts.clear()
        table = self.table
        for slot, job in enumerate(table.jobs):
            if job is not None:
                job.spans.append((int(table.known[slot]), version))
                self._begin(slot, table.known_tokens(slot))
