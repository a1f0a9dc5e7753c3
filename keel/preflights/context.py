"""What checks share: the stack, what has been drawn so far, the independent reference, and the time that is left."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from keel.engines.base import EngineError
from keel.models.progress import no_progress_bars
from keel.monitor.memory import machine_bytes
from keel.preflights.gap import GapFigures, Noise, judged_gap, measure_noise
from keel.preflights.probes import ProbePlan, draw_probes
from keel.preflights.reference import Reference
from keel.preflights.result import Check, Status
from keel.preflights.stack import ProbeData, Stack

PROBE_SHARE = 0.4
"""Of the time budget, what drawing and scoring the probes may take."""


class SkippedError(Exception):
    """A check does not apply, or what it needs is not there; the text is its reason."""


@dataclass
class Context:
    """Everything is made when it is first asked for, and once."""

    stack: Stack
    plan: ProbePlan
    budget_s: float
    began: float = field(default_factory=time.perf_counter)
    _data: ProbeData | None = None
    _noise: Noise | None = None
    _reference: Reference | None = None
    _probes_failure: EngineError | None = None
    engine_failure: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    _started: float = 0.0

    def __post_init__(self) -> None:
        self._started = self._now()

    def _now(self) -> float:
        """Where the engine is in this process, its processor time: then nothing depends on how busy the machine is."""
        config = self.stack.config
        is_here = config is not None and config.engine.id == "embedded" and config.engine.process == "same"
        return time.process_time() if is_here else time.perf_counter()

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left; never less than 0."""
        return max(0.0, self.budget_s - (self._now() - self._started))

    def probes(self) -> ProbeData:
        """Sequences that the engine drew, scored by both sides. Raises EngineError if the engine fails."""
        if self._probes_failure is not None:
            raise EngineError(f"the probes could not be drawn: {self._probes_failure}")
        if self._data is None:
            try:
                self.plan = self._affordable()
                self._data = self._drawn(self.plan)
            except EngineError as error:
                self._probes_failure = error
                raise
        return self._data

    def _drawn(self, plan: ProbePlan) -> ProbeData:
        return with_scores(self.stack, draw_probes(self.stack, plan, self.stack.sampling))

    def _affordable(self) -> ProbePlan:
        """The plan, with fewer sequences if some few, drawn and scored, say that all would take too long."""
        pilot = replace(self.plan.scaled(0.0), seed=self.plan.seed + 1)
        began = self._now()
        drawn = self._drawn(pilot)
        whole_s = (self._now() - began) * self.plan.num_sequences / max(1, len(drawn.sequences))
        share = PROBE_SHARE * self.budget_s / max(whole_s, 1e-9)
        return self.plan if share >= 1 else self.plan.scaled(share)

    @property
    def known_probes(self) -> ProbeData | None:
        """What was drawn, if it could be."""
        return self._data

    def reference(self) -> Reference:
        """The model in plain `transformers`, float32, weights rounded to the type that is served."""
        if self._reference is None:
            source = self.stack.source
            needed = 4 * sum(parameter.numel() for parameter in self.stack.trainer.model.parameters())
            if needed > machine_bytes() / 2:
                raise SkippedError(
                    f"there is no room for an independent reference in float32 ({needed / 2**30:.0f} GiB); check a "
                    "smaller model of the same family, on the same kernels and server"
                )
            with no_progress_bars():
                self._reference = Reference.load(source.path, dtype=torch.float32, served_as=source.dtype)
        return self._reference

    def noise(self) -> Noise:
        """What rounding alone makes of the probes in this stack's type."""
        if self._noise is None:
            self._noise = measure_noise(self.stack, self.probes(), self.reference())
        return self._noise

    def gap(self) -> GapFigures:
        """The gap of the probes, judged against their noise."""
        return judged_gap(self.probes(), self.noise())


def with_scores(stack: Stack, data: ProbeData) -> ProbeData:
    """The same probes, scored by the trainer in its micro-batches and, where it can, by the engine's own `score`."""
    trainer = stack.trainer.score([each.scored for each in data.sequences], with_routes=True)
    found = stack.engine.score([each.token_ids.tolist() for each in data.sequences])
    sequences = []
    for each, scores in zip(data.sequences, found, strict=True):
        values = np.concatenate([[np.nan], np.asarray(scores.logprobs, np.float32)]).astype(np.float32)
        sequences.append(replace(each, engine_scores=values if len(values) == len(each) else None))
    return replace(data, sequences=tuple(sequences), trainer=tuple(trainer))


def check(
    id: str,  # noqa: A002 (the field's name)
    title: str,
    status: Status,
    reason: str,
    *,
    figure: float | None = None,
    threshold: float | None = None,
    unit: str = "",
    fix: str = "",
    **details: object,
) -> Check:
    """A `Check`; a fix is for what warns or fails alone."""
    return Check(id, title, status, reason, figure, threshold, unit, fix if status in ("warn", "fail") else "", details)
