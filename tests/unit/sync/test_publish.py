"""Publishing: which way weights go, and what happens when a place is full. Real files, an engine that only listens."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from keel.sync import publish as publish_module
from keel.sync.base import SyncError, WeightSource
from keel.sync.publish import publish, publish_async
from keel.sync.transports import read_weights, receive_weights, send_weights, write_weights


class Listener:
    """The receiving end of an engine."""

    def __init__(self, *, shares: bool = False, sources: tuple[str, ...] = ("file",)) -> None:
        self.weight = torch.zeros(3)
        self.shares, self.sources = shares, sources
        self.loaded: list[tuple[WeightSource, int]] = []

    def capabilities(self) -> Any:
        told = {"shares_weights": self.shares, "weight_sources": self.sources, "weight_problem": ""}
        return SimpleNamespace(name="listener", **told)

    async def load_weights(self, source: WeightSource, version: int) -> None:
        self.loaded.append((source, version))
        if source.kind == "file":
            read_weights(source.location, {"w": self.weight})


class Sender:
    def __init__(self, *, full: tuple[str, ...] = ()) -> None:
        self.full = full
        self.tried: list[str] = []

    def weights_to(self, source: WeightSource) -> None:
        self.tried.append(str(Path(source.location).parent))
        if self.tried[-1] in self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_weights(source.location, {"w": torch.tensor([1.0, 2.0, 3.0])})


def test_shared_weights_do_not_move() -> None:
    learner, engine = Sender(), Listener(shares=True, sources=("shared",))
    publish(learner, engine, 5)
    assert engine.loaded == [(WeightSource("shared"), 5)]
    assert learner.tried == []


def test_a_file_is_written_read_and_removed(tmp_path: Path) -> None:
    engine = Listener()
    publish(Sender(), engine, 6, directory=tmp_path)
    assert engine.weight.tolist() == [1.0, 2.0, 3.0]
    [(source, version)] = engine.loaded
    assert (source.kind, version) == ("file", 6)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefix", ["keel-weights-", "keel-vllm-weights-"])
def test_what_a_killed_learner_left_is_removed_by_the_next(tmp_path: Path, prefix: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    abandoned = tmp_path / f"{prefix}{child.pid}-x"
    living, others = tmp_path / f"{prefix}{os.getppid()}-x", tmp_path / "keel-weights-of-mine"
    for place in (abandoned, living, others):
        place.mkdir()
        (place / "weights.safetensors").write_bytes(b"old")
    publish(Sender(), Listener(), 6, directory=tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([living, others])


def test_a_full_place_makes_way_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    monkeypatch.setattr(publish_module, "transfer_places", lambda _: [str(small), str(large)])
    learner, engine = Sender(full=(str(small),)), Listener()
    publish(learner, engine, 1)
    assert learner.tried == [str(small), str(large)]
    assert len(engine.loaded) == 1
    with pytest.raises(OSError, match="No space"):
        publish(Sender(full=(str(small), str(large))), Listener(), 2)
    assert [*small.iterdir(), *large.iterdir()] == []


def test_an_engine_that_takes_nothing_on_offer_is_refused() -> None:
    with pytest.raises(SyncError, match=r"listener.*telepathy"):
        asyncio.run(publish_async(Sender(), Listener(sources=("telepathy",)), 1))


class WaitingEngine(Listener):
    """Receives what is broadcast, and waits for it for a while."""

    async def load_weights(self, source: WeightSource, version: int) -> None:
        await asyncio.to_thread(receive_weights, source.location, {"w": self.weight}, timeout_s=40.0)

    def capabilities(self) -> Any:
        return SimpleNamespace(**vars(super().capabilities()), weight_receivers=1)


class BrokenSender:
    def __init__(self, moment: str) -> None:
        self.moment = moment

    def weights_to(self, source: WeightSource) -> None:
        if self.moment == "before":
            raise MemoryError("no room for a whole copy")
        # A tensor that is there by name alone: it fails when the receiver has joined.
        send_weights(source.location, {"w": torch.empty(3, device="meta")}, version=1, timeout_s=40.0)


@pytest.mark.parametrize(
    ("moment", "own"),
    [("before", (MemoryError, "no room for a whole copy")), ("during", (SyncError, "meta tensor"))],
)
def test_a_sender_that_fails_is_heard_though_the_engine_waits(moment: str, own: tuple[type[Exception], str]) -> None:
    with pytest.raises(own[0], match=own[1]) as caught:
        publish(BrokenSender(moment), WaitingEngine(sources=("gloo",)), 1, transport="gloo")
    assert any("at the other end of the broadcast: SyncError" in note for note in caught.value.__notes__)
