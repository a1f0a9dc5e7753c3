"""An engine's process that answers with something unreadable: nobody is left waiting."""

from __future__ import annotations

import asyncio
from multiprocessing.connection import Connection
from typing import Any

import pytest

from keel.config import EngineConfig, ModelConfig
from keel.engines.base import EngineCapabilities, EngineError
from keel.engines.process import EngineProcess


class Unreadable:
    """Can be sent, cannot be received."""

    def __reduce__(self) -> Any:
        return (int, ("no number",))


def answer_unreadably(connection: Connection, spec: Any) -> None:
    """A worker whose second answer cannot be unpickled; it lives on."""
    connection.send(("ready", EngineCapabilities("unreadable", 10, 2, False, True, False, (), True)))
    connection.recv()
    connection.recv()
    connection.send(("result", -1, Unreadable()))
    connection.recv()


def test_an_answer_that_cannot_be_read_fails_all_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keel.engines.process.run_worker", answer_unreadably)
    engine = EngineProcess(ModelConfig(), EngineConfig(), max_sequence_tokens=10)

    async def wait() -> list[Any]:
        calls = (engine.score((1, 2)), engine.end_session("a"))
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), timeout=30)

    try:
        found = asyncio.run(wait())
        assert [type(error) for error in found] == [EngineError, EngineError]
        assert "could not be read: ValueError" in str(found[0])
        with pytest.raises(EngineError):
            asyncio.run(engine.end_session("b"))
    finally:
        engine.stop()
