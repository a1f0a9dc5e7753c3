"""Publishing, over a whole run: which route, and when a check is due."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from keel.sync.base import WeightSender
from keel.sync.check import CheckedEngine, CheckedLearner, WeightCheck, check_sequences
from keel.sync.publish import publish_async


class SyncOptions(Protocol):
    """The config's `sync` section."""

    @property
    def transport(self) -> str: ...

    @property
    def host(self) -> str: ...

    @property
    def check_every(self) -> int: ...

    @property
    def check_tokens(self) -> int: ...


class PublishingLearner(WeightSender, CheckedLearner, Protocol):
    """A learner that publishes and can be checked."""

    @property
    def version(self) -> int: ...


class Publisher:
    """Gives an engine a learner's weights, again and again, and checks on a schedule that they arrived."""

    def __init__(
        self,
        options: SyncOptions,
        *,
        run: Callable[[Coroutine[Any, Any, dict[str, float]]], dict[str, float]],
        dtype: str,
        vocab_size: int,
        window: int,
        attached: bool,
        may_perturb: bool,
    ) -> None:
        """`run` runs a coroutine on the engine's event loop. `window` is the model's sliding window, 0 if it has none.
        An `attached` engine was there before, so its first weights are not known; `may_perturb` as in `WeightCheck`."""
        self._options, self._run = options, run
        self._dtype, self._vocab_size, self._window = dtype, vocab_size, window
        self._attached, self._may_perturb = attached, may_perturb
        self._check: WeightCheck | None = None
        self._num_published = 0

    def publish(self, learner: PublishingLearner, engine: CheckedEngine) -> dict[str, float]:
        """Push, check if it is due, and return what the check measured.

        Raises SyncError if the weights cannot be moved, StaleWeightsError if they were and did not arrive.
        """
        return self._run(self._publish(learner, engine))

    async def _publish(self, learner: PublishingLearner, engine: CheckedEngine) -> dict[str, float]:
        options, version = self._options, learner.version

        async def push() -> None:
            await publish_async(learner, engine, version, transport=options.transport, host=options.host)

        due = self._is_due() and not engine.capabilities().shares_weights
        # Weights that the engine has already arrive whatever the push does: there is nothing to check, but to compare.
        known = self._num_published == 0 and version == 0 and not self._attached
        if due and self._check is None:
            self._check = self._new_check(engine)
            if known:
                await self._check.measure_baseline(learner, engine)
        await push()
        self._num_published += 1
        if not due or known or self._check is None:
            return {}
        return await self._check.run(learner, engine, push)

    def _is_due(self) -> bool:
        """At the first two publishes, so that a short run is checked too, and every `check_every` from the start."""
        every, number = self._options.check_every, self._num_published
        return every > 0 and (number < 2 or number % every == 0)

    def _new_check(self, engine: CheckedEngine) -> WeightCheck:
        sequences = check_sequences(
            num_tokens=self._options.check_tokens,
            vocab_size=self._vocab_size,
            window=self._window,
            capacity=engine.capabilities().max_sequence_tokens,
        )
        return WeightCheck(sequences, dtype=self._dtype, may_perturb=self._may_perturb)
