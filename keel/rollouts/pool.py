"""Environments at hand: one per running episode, used again for the next, thrown away when one has failed."""

from __future__ import annotations

import contextlib

from keel.envs.base import Env
from keel.envs.calls import call_with_timeout
from keel.envs.load import EnvFactory

_CLOSE_TIMEOUT_S = 10.0


class EnvPool:
    """Makes environments with `factory` as they are needed. Used on one event loop."""

    def __init__(self, factory: EnvFactory) -> None:
        self._factory = factory
        self._idle: list[Env] = []

    def take(self) -> Env:
        """An environment for one episode. Raises what the factory raises."""
        return self._idle.pop() if self._idle else self._factory()

    def give_back(self, env: Env) -> None:
        """Keep an environment whose episode ended in good order."""
        self._idle.append(env)

    async def discard(self, env: Env, *, hanging: bool) -> None:
        """Drop an environment that failed; a hanging one is still inside a call, so it is not closed."""
        if not hanging:
            # It has failed already, and its episode says so: what else goes wrong in its close() changes nothing.
            with contextlib.suppress(Exception):
                await call_with_timeout(env.close, timeout_s=_CLOSE_TIMEOUT_S)

    async def close(self) -> None:
        """Close all idle environments; raises the first error of their close()."""
        environments, self._idle = self._idle, []
        first: Exception | None = None
        for env in environments:
            try:
                if type(env).close is not Env.close:
                    await call_with_timeout(env.close, timeout_s=_CLOSE_TIMEOUT_S)
            except Exception as error:  # noqa: BLE001 (user code; the first error is raised below)
                first = first or error
        if first is not None:
            raise first
