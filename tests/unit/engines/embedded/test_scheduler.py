"""The scheduler alone, driven through random lives of sessions by a stand-in for the passes: nobody waits for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.engines.base import GenerateRequest
from keel.engines.embedded.sampling import Draws
from keel.engines.embedded.scheduler import Scheduler
from keel.engines.embedded.slots import FREE, HELD, Job, SlotTable
from keel.types import SamplingSettings

CHUNK, TILE_ROWS, TILE_CHUNKS, ROWS, CAPACITY = 4, 12, 3, 8, 40


class World:
    """Runs a scheduler; keeps its own account, token by token, of what each slot's cache would hold."""

    def __init__(self, num_slots: int, kept_behind: int | None = None) -> None:
        self.table = SlotTable(ROWS, CAPACITY, kept_behind)
        self.scheduler = Scheduler(self.table, num_slots, CHUNK, TILE_ROWS, TILE_CHUNKS)
        self.cache: list[dict[int, tuple[int, int, str]]] = [{} for _ in range(ROWS)]  # place: (token, epoch, how)
        self.done: list[Job] = []

    def submit(self, session: str, tokens: tuple[int, ...], length: int) -> Job:
        request = GenerateRequest(session, session, tokens, SamplingSettings(), length, (), 0)
        job = Job(request, None, seed_state=1)
        self.scheduler.submit(job)
        return job

    def iterate(self) -> bool:
        scheduler, table = self.scheduler, self.table
        scheduler.admit()
        worked = False
        while True:
            for copy in scheduler.take_copies():
                written = int(table.written[copy.source])
                assert written - copy.length <= table.kept_behind
                for target in copy.targets:
                    self.cache[target] = {place: self.cache[copy.source][place] for place in range(copy.length)}
            chunks = scheduler.next_tile()
            if not chunks:
                break
            assert len(chunks) <= TILE_CHUNKS
            assert sum(chunk.stop - chunk.start for chunk in chunks) <= TILE_ROWS
            for chunk in chunks:
                assert 0 < chunk.stop - chunk.start <= CHUNK
                self._feed(chunk.slot, chunk.start, chunk.stop, f"chunk from {chunk.start}")
            scheduler.tile_done(chunks)
            worked = True
        active = scheduler.decoding()
        for slot in np.flatnonzero(active):
            self._feed(int(slot), int(table.fed[slot]), int(table.fed[slot]) + 1, "decoded")
        if active.any():
            scheduler.decode_done(active)
            worked = True
        ready = scheduler.ready()
        draws = Draws(np.arange(ROWS) + 100, np.zeros(ROWS), np.ones(ROWS, dtype=bool), {})
        for ended in scheduler.take_draws(ready, draws):
            self.done.append(ended.job)
            scheduler.finish(ended.job)
        self.check()
        return worked

    def _feed(self, slot: int, start: int, stop: int, how: str) -> None:
        for place in range(start, stop):
            self.cache[slot][place] = (int(self.table.tokens[slot, place]), self.scheduler.epoch, how)
        assert self.table.written[slot] - start <= self.table.kept_behind + TILE_ROWS

    def check(self) -> None:
        """What the table says is fed is in the cache, token for token; shareable means in chunks counted from 0."""
        for slot in range(ROWS):
            if self.table.state[slot] != FREE and self.table.epoch[slot] == self.scheduler.epoch:
                for place in range(int(self.table.fed[slot])):
                    token, epoch, _ = self.cache[slot][place]
                    assert (token, epoch) == (int(self.table.tokens[slot, place]), self.scheduler.epoch)
            if self.table.epoch[slot] == self.scheduler.epoch:
                for place in range(int(self.table.shareable[slot])):
                    assert self.cache[slot][place][2] == f"chunk from {place - place % CHUNK}"


events = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 11), st.integers(0, 2), st.integers(1, 24), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 11)),
    st.tuples(st.just("end"), st.integers(0, 11)),
    st.tuples(st.just("weights"), st.integers(1, 9)),
    st.tuples(st.just("iterate"), st.integers(1, 4)),
)


@given(st.lists(events, max_size=40), st.integers(1, ROWS), st.sampled_from([None, TILE_ROWS]))
@settings(max_examples=150, deadline=None)
def test_whatever_happens_every_request_ends_and_every_slot_comes_back(
    happenings: list[tuple[object, ...]], num_slots: int, kept_behind: int | None
) -> None:
    world = World(num_slots, kept_behind)
    live: dict[str, Job] = {}
    for kind, *arguments in happenings:
        name = f"session {arguments[0]}"
        if kind == "submit" and not world.scheduler.is_busy(name):
            _, family, size, length = (int(str(argument)) for argument in arguments)
            live[name] = world.submit(name, tuple(family * 50 + i for i in range(size)), length)
        elif kind == "cancel" and (job := world.scheduler.find(name)) is not None:
            world.scheduler.drop(job)
            live.pop(name)
        elif kind == "end" and not world.scheduler.is_busy(name):
            world.scheduler.end_session(name)
        elif kind == "weights":
            world.scheduler.invalidate(int(str(arguments[0])))
        elif kind == "iterate":
            for _ in range(int(str(arguments[0]))):
                world.iterate()
    for _ in range(400):
        if not world.iterate() and not world.scheduler.jobs():  # sessions at rest hold nobody up
            break
    assert world.scheduler.jobs() == []
    assert all(job in world.done for job in live.values())
    world.iterate()
    for session in list(world.scheduler.slot_of):
        world.scheduler.end_session(session)
    assert (world.table.state == FREE).all()
    assert sorted(world.scheduler._free) == list(range(num_slots))


def test_chunks_are_cut_by_the_requests_own_positions() -> None:
    world = World(2)
    world.submit("a", tuple(range(10)), 3)
    world.submit("b", tuple(range(200, 207)), 1)
    world.scheduler.admit()
    assert [(c.slot, c.start, c.stop, c.last) for c in world.scheduler.next_tile()] == [
        (0, 0, 4, False),
        (0, 4, 8, False),
        (0, 8, 10, True),
    ]


def test_a_second_turn_is_cut_from_where_it_starts() -> None:
    world = World(1)
    world.submit("a", tuple(range(6)), 3)
    while world.scheduler.is_busy("a"):
        world.iterate()
    assert world.table.state[0] == HELD
    drawn = tuple(world.table.tokens[0, 6:9].tolist())
    world.submit("a", (*range(6), *drawn, 1, 2, 3, 4, 5), 1)
    world.scheduler.admit()
    chunks = world.scheduler.next_tile()
    assert [(chunk.start, chunk.stop) for chunk in chunks] == [(8, 12), (12, 14)]


@pytest.mark.parametrize("family", [0, 1])
def test_a_part_filled_tile_waits_while_others_decode_but_not_for_ever(family: int) -> None:
    world = World(4)
    world.submit("long", tuple(range(4)), 30)
    world.iterate()
    world.submit("short", tuple(family * 50 + i for i in range(5)), 1)
    waited = 0
    while world.scheduler.is_busy("short"):
        world.iterate()
        waited += 1
    # Five tokens (or, four being shared, one): 7 (11) of 12 rows are unused, one is lost per pass.
    assert waited == {1: 8, 0: 12}[family]
