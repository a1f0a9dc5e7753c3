"""Publish: give the engine the learner's current weights under a new version number."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

from keel.sync.base import SyncError, WeightKind, WeightReceiver, WeightSender, WeightSource
from keel.sync.transports import is_full, transfer_places, weights_directory
from keel.sync.vllm_worker.channel import Address, RefusedError, call_off, called_off

Runner = Callable[[Coroutine[Any, Any, None]], None]
BROADCASTS = ("nccl", "gloo")
RELEASE_S = 10.0
"""How long the end of a broadcast that did not fail is given to hear of it."""

logger = logging.getLogger(__name__)


def publish(
    learner: WeightSender,
    engine: WeightReceiver,
    version: int,
    *,
    transport: str = "auto",
    directory: str | Path | None = None,
    host: str = "127.0.0.1",
    run: Runner = asyncio.run,
) -> None:
    """Like `publish_async`, for a caller without an event loop.

    `run` runs the coroutine to its end; pass the collector's own runner if the engine lives on another thread's loop.
    """
    run(publish_async(learner, engine, version, transport=transport, directory=directory, host=host))


async def publish_async(
    learner: WeightSender,
    engine: WeightReceiver,
    version: int,
    *,
    transport: str = "auto",
    directory: str | Path | None = None,
    host: str = "127.0.0.1",
) -> None:
    """Make `engine` sample from `learner`'s current weights, as policy version `version`.

    An engine that shares the learner's storage only gets the new number (and forgets its keys and values). Otherwise
    the weights take the route that `choose_transport` finds. A file lies below `directory` if given, else in shared
    memory, else (none there, or full) in the temporary directory; it is removed after the engine has read it. A
    broadcast is sent from `host`.

    Raises SyncError if the engine takes no kind of source that can be offered, or if names, shapes or types differ.
    """
    kind = choose_transport(transport, engine.capabilities())
    if kind == "shared":
        await engine.load_weights(WeightSource("shared"), version)
    elif kind == "file":
        await _publish_by_file(learner, engine, version, directory)
    else:
        await _publish_by_broadcast(learner, engine, version, kind, host)


def choose_transport(transport: str, capabilities: Any) -> WeightKind:
    """The route that the config's `sync.transport` means for an engine: what it shares needs none; "auto" is a file
    where the engine takes one, else a broadcast.

    Raises SyncError if the engine does not take what is asked for.
    """
    if capabilities.shares_weights:
        return "shared"
    taken = tuple(capabilities.weight_sources)
    wanted = ("file", *BROADCASTS) if transport == "auto" else (transport,)
    for kind in wanted:
        if kind in taken:
            return cast("WeightKind", kind)
    if capabilities.weight_problem:
        raise SyncError(f"publish: engine {capabilities.name!r} takes no weights: {capabilities.weight_problem}")
    raise SyncError(
        f"publish: engine {capabilities.name!r} takes weights from {list(taken) or 'nowhere'}, and sync.transport = "
        f"{transport!r} offers {list(wanted)}; set sync.transport to one that it takes, or choose another engine"
    )


async def _publish_by_file(
    learner: WeightSender, engine: WeightReceiver, version: int, directory: str | Path | None
) -> None:
    places = transfer_places(directory)
    for index, place in enumerate(places):
        with weights_directory(place) as location:
            source = WeightSource("file", location)
            try:
                learner.weights_to(source)
            except OSError as error:
                if not is_full(error) or index + 1 == len(places):
                    raise
                logger.warning("publish: %s is full, trying the temporary directory: %s", place, error)
                continue
            await engine.load_weights(source, version)
            return


async def _publish_by_broadcast(
    learner: WeightSender, engine: WeightReceiver, version: int, kind: WeightKind, host: str
) -> None:
    """Both ends at once: the learner sends from a thread of its own while the engine receives.

    If one end fails, the other is let go, and the words of the one that began it are raised, the other's beneath.
    """
    address = Address(kind, host, _free_port(host), engine.capabilities().weight_receivers)
    source = WeightSource(kind, address.as_text())
    sending = asyncio.ensure_future(asyncio.to_thread(learner.weights_to, source))
    receiving = asyncio.ensure_future(engine.load_weights(source, version))
    try:
        await asyncio.wait({sending, receiving}, return_when=asyncio.FIRST_EXCEPTION)
    except asyncio.CancelledError:
        receiving.cancel()
        await asyncio.wait({receiving})
        await _let_sender_go(address, sending, "the publish was cancelled")
        raise
    await _let_sender_go(address, sending, str(_error_of(receiving)))
    await _let_receivers_go(address, receiving, str(_error_of(sending)))
    ours, theirs = _error_of(sending), _error_of(receiving)
    if ours is not None and theirs is not None and not isinstance(ours.__cause__, RefusedError):
        # Which is first, no clock tells. An engine whose transfer failed did not begin it, one that is lost did.
        first, other = (ours, theirs) if isinstance(theirs, SyncError) else (theirs, ours)
        first.add_note(f"at the other end of the broadcast: {type(other).__name__}: {other}")
        raise first
    if error := theirs or ours:
        raise error


async def _let_sender_go(address: Address, sending: asyncio.Future[None], reason: str) -> None:
    if not sending.done():
        with contextlib.suppress(RuntimeError):  # the sender has gone too
            await asyncio.to_thread(call_off, address, reason, RELEASE_S)
        await asyncio.wait({sending})


async def _let_receivers_go(address: Address, receiving: asyncio.Future[None], reason: str) -> None:
    """They may wait for a sender that never opened its store: who does not hear in time is cancelled."""
    if receiving.done():
        return
    with contextlib.ExitStack() as standing:
        with contextlib.suppress(RuntimeError):  # the sender's own store still stands, and ends with it
            standing.enter_context(called_off(address, reason, RELEASE_S))
        await asyncio.wait({receiving}, timeout=RELEASE_S)
    receiving.cancel()
    await asyncio.wait({receiving})


def _error_of(end: asyncio.Future[None]) -> BaseException | None:
    if not end.done() or end.cancelled():
        return None
    return end.exception()


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
