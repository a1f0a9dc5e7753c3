"""Which side is at fault, and why: hypotheses about what it computes instead, held against an independent reference."""

from __future__ import annotations

from collections.abc import Sequence

from keel.preflights.diagnosis_evidence import ProbeSequence, StackFacts
from keel.preflights.reference import Reference
from keel.preflights.result import Attribution


def diagnose(
    reference: Reference, probes: Sequence[ProbeSequence], facts: StackFacts | None = None, *, budget_s: float = 60.0
) -> tuple[Attribution, ...]:
    """What explains each side's gap to `reference` on `probes`, the largest first; empty if nothing has to be explained.

    A side without log-probs is left out. Takes about `budget_s` seconds at most, and says so where that cut it short.
    """
    raise NotImplementedError
