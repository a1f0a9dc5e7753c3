"""The weight check: after a push, do both sides give fixed tokens the same log-probs? If not, which weights are stale?

An engine may answer that all went well and sample from old weights. So both sides score the same tokens, and the median
of the absolute differences is compared with a tolerance. The median, because in a mixture of experts a few tokens
differ for a better reason: a near-tie between experts that rounding decides. The tolerance is a multiple of
what was measured before the first push, when both sides have the same weights from the same files; where there was no
such moment (a resumed run, a server that was there before), of what was measured after it, and then bounded by type: a
push that goes wrong from the start does not set its own standard.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from keel.engines.base import EngineError, ScoreResult, WeightSource
from keel.sync.base import SyncError
from keel.sync.groups import tensor_groups

logger = logging.getLogger(__name__)

Scores = tuple[tuple[float, ...], ...]
Push = Callable[[], Awaitable[None]]

BASELINE_FACTOR = 3.0
BOUNDS = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 0.1)}
"""Least and largest tolerance of the median, by type: sound stacks have 6e-7 and 0.003 to 0.02."""
MOVED, WRONG = 0.1, 0.5
"""A stale group moves the engine's scores by less than the first share of what it moves the learner's; one that arrives
moves them alike, to less than the second."""
LEAST_SEQUENCE = 64


class StaleWeightsError(SyncError):
    """Weights were pushed and did not arrive. `groups` are the kinds of tensors that are stale, if they could be told
    apart; `gap` is what was measured."""

    def __init__(self, message: str, groups: Sequence[str] = (), gap: Gap | None = None) -> None:
        super().__init__(message)
        self.groups, self.gap = tuple(groups), gap


class CheckedLearner(Protocol):
    """A learner, as far as a check goes."""

    def weight_names(self) -> tuple[str, ...]: ...

    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> Scores: ...

    def change_weights(self, names: Sequence[str], change: Literal["noise", "zero"], seed: int) -> None: ...

    def restore_weights(self) -> None: ...


class CheckedEngine(Protocol):
    """An engine, as far as a check goes."""

    def capabilities(self) -> Any: ...

    async def score(self, token_ids: tuple[int, ...]) -> ScoreResult: ...

    async def load_weights(self, source: WeightSource, version: int) -> None: ...


@dataclass(frozen=True)
class Gap:
    """Absolute differences of two sides' log-probs of the same tokens, in nats."""

    median: float
    mean: float
    max: float
    finite: bool

    @classmethod
    def between(cls, ours: Scores, theirs: Scores) -> Gap:
        """Raises SyncError if the two are not of the same tokens."""
        mine, other = _flat(ours), _flat(theirs)
        if mine.shape != other.shape:
            raise SyncError(f"weight check: {mine.numel()} log-probs from one side, {other.numel()} from the other")
        apart = (mine - other).abs()
        if not bool(torch.isfinite(apart).all()):
            return cls(float("inf"), float("inf"), float("inf"), False)
        return cls(float(apart.median()), float(apart.mean()), float(apart.max()), True)


def check_sequences(
    *, num_tokens: int, vocab_size: int, window: int, capacity: int, seed: int = 0
) -> tuple[tuple[int, ...], ...]:
    """About `num_tokens` fixed tokens, spread evenly over the vocabulary, in sequences twice as long as the sliding
    `window` (0: none) if the engine's `capacity` allows."""
    generator = torch.Generator().manual_seed(seed)
    length = min(capacity - 1, max(2 * window + 8, LEAST_SEQUENCE))
    count = max(1, round(num_tokens / length))
    total = count * length
    spread = (torch.arange(total, dtype=torch.float64) * vocab_size / total).long()
    tokens = spread[torch.randperm(total, generator=generator)].view(count, length)
    return tuple(tuple(row) for row in tokens.tolist())


class WeightCheck:
    """Checks of one pair of learner and engine; keeps the baseline."""

    def __init__(self, sequences: tuple[tuple[int, ...], ...], *, dtype: str, may_perturb: bool) -> None:
        """`dtype` is that of both sides' weights. `may_perturb` allows wrong weights to be pushed for a moment, to find
        out which did not arrive; the right ones are pushed again afterwards."""
        self._sequences = sequences
        self._least, self._most = BOUNDS[dtype]
        self._may_perturb = may_perturb
        self._baseline: float | None = None
        self._all_arrived = False  # at a check whose gap no group explained

    @property
    def tolerance(self) -> float:
        """Largest median of the absolute differences that is taken for rounding.

        A stack that was apart from the start does not widen it, until every group was seen to arrive: else the first
        fault would hide the second.
        """
        if self._baseline is None:
            return self._most
        usual = max(self._least, BASELINE_FACTOR * self._baseline)
        return usual if self._all_arrived else min(usual, self._most)

    async def measure_baseline(self, learner: CheckedLearner, engine: CheckedEngine) -> None:
        """Call before the first push, where both sides have the same weights: what differs now is no push's fault.

        Raises SyncError if the engine cannot score given tokens; so does `run`.
        """
        gap = await self._gap(learner, engine)
        if gap.finite:
            self._baseline = gap.median
        if gap.median > self._most:
            logger.warning(
                "weight check: before any push, learner and engine %r differ by %.2g (median of %d fixed tokens), and "
                "rounding explains %.2g; `keel preflight` looks for the cause",
                *(engine.capabilities().name, gap.median, self._num_tokens, self._most),
            )

    async def run(self, learner: CheckedLearner, engine: CheckedEngine, push: Push) -> dict[str, float]:
        """Compare, and return `sync/check_*`. `push` publishes the learner's weights as they are now.

        Raises StaleWeightsError, naming the stale groups, if the difference is larger than rounding explains. One that
        no group explains (each that is changed arrives) is warned of, and is the new baseline: weights are not its
        cause. Unless both sides agreed before: what parted them came with a push, and is raised without a name.
        """
        begun = time.perf_counter()
        gap, tolerance = await self._gap(learner, engine), self.tolerance
        if gap.median > tolerance:
            told = self._told(gap, engine)
            if not gap.finite:
                raise StaleWeightsError(
                    f"{told}; some are not numbers: look for NaN in the weights (the step before, the checkpoint)",
                    (),
                    gap,
                )
            if not self._may_perturb:
                raise StaleWeightsError(
                    f"{told}. Which tensors are stale was not tried out, because that pushes wrong weights for a "
                    "moment and this server was only attached to; engine.vllm.allow_weight_push = true allows it",
                    (),
                    gap,
                )
            if groups := await self._stale(learner, engine, push):
                raise StaleWeightsError(
                    f"{told}. Stale or wrongly written in the engine: {', '.join(groups)}. Its way of loading weights "
                    "does not reach them: push through Keel's worker extension (engine.id = 'vllm'), or sample with "
                    "the embedded engine",
                    groups,
                    gap,
                )
            if self._baseline is not None and self._baseline <= self._most < gap.median:
                raise StaleWeightsError(
                    f"{told}. Both sides did agree (to {self._baseline:.2g}), and every group of tensors follows when "
                    "all of it is changed: so a part of one does not arrive, one layer's or one rank's. Push through "
                    "Keel's worker extension (engine.id = 'vllm'), or sample with the embedded engine",
                    (),
                    gap,
                )
            logger.warning("%s. Every group of tensors arrives when it is changed, so weights are not the cause", told)
            self._all_arrived = True
        if self._baseline is None or gap.median > tolerance:
            self._baseline = gap.median
        return {
            "sync/check_abs_median": gap.median,
            "sync/check_abs_mean": gap.mean,
            "sync/check_abs_max": gap.max,
            "sync/check_tolerance": tolerance,
            "sync/check_s": time.perf_counter() - begun,
        }

    async def _gap(self, learner: CheckedLearner, engine: CheckedEngine) -> Gap:
        ours = learner.score_tokens(self._sequences)
        if not bool(torch.isfinite(_flat(ours)).all()):
            return Gap.between(ours, ours)  # an engine would only say that it cannot score with such weights
        return Gap.between(ours, await self._scores(engine))

    @property
    def _num_tokens(self) -> int:
        return sum(len(sequence) - 1 for sequence in self._sequences)

    def _told(self, gap: Gap, engine: CheckedEngine) -> str:
        return (
            f"weight check: after a push, learner and engine {engine.capabilities().name!r} give {self._num_tokens} "
            f"fixed tokens log-probs that differ by {gap.median:.2g} (median; mean {gap.mean:.2g}, largest "
            f"{gap.max:.2g}), and rounding explains {self.tolerance:.2g}"
        )

    async def _scores(self, engine: CheckedEngine) -> Scores:
        try:
            return tuple([(await engine.score(sequence)).logprobs for sequence in self._sequences])
        except (NotImplementedError, EngineError) as error:
            raise SyncError(
                f"weight check: engine {engine.capabilities().name!r} gives no log-probs of given "
                f"tokens ({type(error).__name__}: {str(error) or 'no more is said'}), so nobody knows whether weights "
                "arrive. Give the engine a `score` (`Engine.score` in keel.engines.base), or go without the check: "
                "sync.check_every = 0"
            ) from error

    async def _stale(self, learner: CheckedLearner, engine: CheckedEngine, push: Push) -> list[str]:
        """The stale groups, with the right weights pushed again in the end."""
        groups = tensor_groups(learner.weight_names())
        try:
            unmoved, wrong = await self._unmoved(learner, engine, push, groups)
            return unmoved or await self._garbled(learner, engine, push, {group: groups[group] for group in wrong})
        finally:
            learner.restore_weights()
            await push()

    async def _unmoved(
        self, learner: CheckedLearner, engine: CheckedEngine, push: Push, groups: dict[str, list[str]]
    ) -> tuple[list[str], list[str]]:
        """Groups whose change the learner's scores show and the engine's do not (old values are in their place), and
        those that change the engine's otherwise than the learner's."""
        before, before_there = _flat(learner.score_tokens(self._sequences)), _flat(await self._scores(engine))
        unmoved, wrong = [], []
        for index, (group, names) in enumerate(groups.items()):
            learner.change_weights(names, "noise", index)
            here, there = await self._pushed(learner, engine, push)
            learner.restore_weights()
            moved, moved_there = here - before, there - before_there
            size = float(moved.abs().median())
            if size <= self._least:
                continue  # without effect on these tokens
            if float(moved_there.abs().median()) < MOVED * size:
                unmoved.append(group)
            elif float((moved_there - moved).abs().median()) > WRONG * size:
                wrong.append(group)
        return unmoved, wrong

    async def _garbled(
        self, learner: CheckedLearner, engine: CheckedEngine, push: Push, groups: dict[str, list[str]]
    ) -> list[str]:
        """Of `groups`, whose change moves the engine otherwise than the learner, those that are the cause: written in
        a wrong order, say, or to one of two places.

        Zeros are the same in every order. So those are suspected whose zeros make both sides agree; of these, those are
        cleared that arrive as they should while another suspect is zero.
        """
        suspects = []
        for group, names in groups.items():
            learner.change_weights(names, "zero", 0)
            here, there = await self._pushed(learner, engine, push)
            learner.restore_weights()
            if float((here - there).abs().median()) <= self.tolerance:
                suspects.append(group)
        cleared = set()
        for group in suspects:
            for other in suspects:
                if group != other and group not in cleared:
                    learner.change_weights(groups[other], "zero", 0)
                    before = _flat(learner.score_tokens(self._sequences))
                    learner.change_weights(groups[group], "noise", 1)
                    here, there = await self._pushed(learner, engine, push)
                    learner.restore_weights()
                    moved = float((here - before).abs().median()) > self._most
                    if moved and float((here - there).abs().median()) <= self._most:
                        cleared.add(group)
        return [group for group in suspects if group not in cleared]

    async def _pushed(
        self, learner: CheckedLearner, engine: CheckedEngine, push: Push
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides' scores [T] of the weights as they are now, pushed."""
        await push()
        return _flat(learner.score_tokens(self._sequences)), _flat(await self._scores(engine))


def _flat(scores: Scores) -> torch.Tensor:
    """[T] float64."""
    return torch.tensor([value for row in scores for value in row], dtype=torch.float64)
