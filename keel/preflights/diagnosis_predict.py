"""What the reference would say of the drawn tokens if some hypotheses were true."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import torch

from keel.causes import Side
from keel.preflights.diagnosis_evidence import Array, Evidence, Readout, Rows, StackFacts
from keel.preflights.diagnosis_hypotheses import Hypothesis
from keel.preflights.diagnosis_readings import Reading, read_otherwise
from keel.preflights.reference import Feed, Reference
from keel.preflights.reference_changes import Change

CACHED_BYTES = 1 << 30
TRIMMED_SHARE = 0.02


def level(residual: Array) -> float:
    """Mean absolute value without the largest 2 %: a rare near-tie of a router says nothing about the rest."""
    found = np.sort(np.abs(residual[np.isfinite(residual)]))
    kept = found[: max(1, round(len(found) * (1.0 - TRIMMED_SHARE)))]
    return float(kept.mean()) if len(kept) else float("nan")


def _both(first: Readout, second: Readout) -> Readout:
    """What `first` says, and what `second` says otherwise than usual."""
    usual = Readout()
    said = {item.name: getattr(second, item.name) for item in fields(Readout)}
    return replace(first, **{name: value for name, value in said.items() if value != getattr(usual, name)})


class Predictor:
    """Log-probs of the evidence's drawn tokens under hypotheses; passes that were made are kept while there is room."""

    def __init__(self, reference: Reference, evidence: Evidence, facts: StackFacts) -> None:
        self.reference, self.evidence, self.facts = reference, evidence, facts
        self.rows = Rows(evidence)
        self._feeds = evidence.feeds()
        self._kept: OrderedDict[tuple[object, ...], torch.Tensor] = OrderedDict()
        self.base_logits = reference.logits(self._feeds)
        self.rows.keep_support(self.base_logits)
        self.base = self.rows.logprobs(self.base_logits)

    def logprobs(self, hypotheses: Sequence[Hypothesis]) -> Array:
        """`[N]`; any two of the hypotheses must be compatible."""
        changes = tuple(each.change for each in hypotheses if each.change is not None)
        readings = tuple(each.reading for each in hypotheses if each.reading is not None)
        readout = Readout()
        for each in hypotheses:
            if each.readout is not None:
                readout = _both(readout, each.readout)
        logits = self._logits(changes, readings)
        found = self.rows.logprobs(logits, readout)
        if readout.replies is None:
            return found
        as_asked = self.rows.logprobs(logits, Readout(shift=readout.shift, rounded=readout.rounded))
        chosen = [reply in readout.replies for reply in self.evidence.replies]
        return np.where(chosen, found, as_asked)

    def noise(self, dtype: str) -> float:
        """Level of rounding: `dtype` against float32, or float32 against float64."""
        change = Change("bfloat16") if dtype == "bfloat16" else Change("float64")
        return level(self.rows.logprobs(self._logits((change,), ())) - self.base)

    def _logits(self, changes: tuple[Change, ...], readings: tuple[Reading, ...]) -> torch.Tensor:
        key = (changes, readings)
        if not changes and not readings:
            return self.base_logits
        if key not in self._kept:
            self._kept[key] = self._pass(changes, readings)
            while len(self._kept) > 1 and sum(each.nbytes for each in self._kept.values()) > CACHED_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _pass(self, changes: tuple[Change, ...], readings: tuple[Reading, ...]) -> torch.Tensor:
        if not readings:
            return self.reference.logits(self._feeds, changes)
        if readings[0].kind == "routes":
            side: Side = "learner" if readings[0].token else "engine"
            return self.reference.logits(self._with_routes(side), changes)
        feeds, targets = read_otherwise(readings, self.evidence, self.facts)
        logits = self.base_logits.clone()
        logits[torch.tensor(targets)] = self.reference.logits(feeds, changes)
        return logits

    def _with_routes(self, side: Side) -> list[Feed]:
        found = []
        for index, feed in enumerate(self._feeds):
            routes = self.evidence.routes_of(side, index)
            found.append(feed if routes is None else replace(feed, routes=torch.from_numpy(routes.astype(np.int64))))
        return found
