"""How many requests are at the server, and who waits on this side until there is room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """At most `limit` at once, first come first served; the others wait here, where waiting costs nothing."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._places: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}
        self.running = 0
        self.waiting = 0

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Wait for a place, and have it."""
        loop = asyncio.get_running_loop()
        if loop not in self._places:  # a semaphore belongs to the loop it was first waited for on
            self._places = {known: place for known, place in self._places.items() if not known.is_closed()}
            self._places[loop] = asyncio.Semaphore(self._limit)
        self.waiting += 1
        try:
            await self._places[loop].acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._places[loop].release()
