"""Publish: give the engine the learner's current weights under a new version number."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from keel.sync.base import SyncError, WeightReceiver, WeightSender, WeightSource
from keel.sync.transports import is_full, transfer_places, weights_directory

Runner = Callable[[Coroutine[Any, Any, None]], None]

logger = logging.getLogger(__name__)


def publish(
    learner: WeightSender,
    engine: WeightReceiver,
    version: int,
    *,
    directory: str | Path | None = None,
    run: Runner = asyncio.run,
) -> None:
    """Like `publish_async`, for a caller without an event loop.

    `run` runs the coroutine to its end; pass the collector's own runner if the engine lives on another thread's loop.
    """
    run(publish_async(learner, engine, version, directory=directory))


async def publish_async(
    learner: WeightSender,
    engine: WeightReceiver,
    version: int,
    *,
    directory: str | Path | None = None,
) -> None:
    """Make `engine` sample from `learner`'s current weights, as policy version `version`.

    An engine that shares the learner's storage only gets the new number (and forgets its keys and values). Otherwise
    the weights go through a directory: below `directory` if given, else in shared memory, else (none there, or full)
    in the temporary directory; it is removed after the engine has read it.

    Raises SyncError if the engine takes no kind of source that can be offered, or if names, shapes or types differ.
    """
    capabilities = engine.capabilities()
    if capabilities.shares_weights:
        await engine.load_weights(WeightSource("shared"), version)
        return
    if "file" not in capabilities.weight_sources:
        raise SyncError(
            f"publish: engine {capabilities.name!r} takes weights from {list(capabilities.weight_sources)}; "
            "the learner offers 'shared' (same storage) and 'file'"
        )
    await _publish_by_file(learner, engine, version, directory)


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
