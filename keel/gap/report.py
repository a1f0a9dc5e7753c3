"""What a log says about the gap, as plain values: to print, to write as JSON, to show in a notebook. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from keel.gap.corrections import CorrectionEffect
from keel.gap.statistics import PEER_METRICS
from keel.gap.worst import WorstToken
from keel.monitor import cells
from keel.monitor.bands import BANDS
from keel.monitor.live import number
from keel.monitor.printable import one_line
from keel.secrecy import scrubbed, scrubbed_values

__all__ = ["GapReport"]

SCHEMA_VERSION = 1
WORDS: tuple[tuple[str, str], ...] = (
    ("abs_mean", "|d| mean"),
    ("abs_p50", "|d| median"),
    ("abs_p90", "|d| 90th percentile"),
    ("abs_p99", "|d| 99th percentile"),
    ("abs_max", "|d| max"),
    ("k1", "k1, mean of -d"),
    ("k3", "k3, mean of exp(d) - 1 - d"),
    ("ess", "effective sample size of r, share"),
    ("chi2", "chi2, mean of r^2 less 1"),
    ("route_diff", "tokens routed differently, share"),
)
TEXT_LIMIT = 60


@dataclass(frozen=True)
class GapReport:
    """The gap between engine and learner in a log; `d` is learner minus engine, in nats, and `r = exp(d)`.

    `statistics` are those of `keel.gap.statistics.gap_statistics`, and `route_diff` where both sides' routes are known;
    `peers` has the same gap under other trainers' names. `corrections` is what each would have done, `worst` the tokens
    with the largest gap. `recomputed` names the model that gave the learner's side; "" if the log has it.
    """

    kind: str
    num_sequences: int
    num_trajectories: int
    statistics: Mapping[str, float]
    peers: Mapping[str, float]
    corrections: tuple[CorrectionEffect, ...]
    worst: tuple[WorstToken, ...] = field(repr=False)
    recomputed: str = ""
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Drawn tokens compared."""
        return int(self.statistics["tokens"])

    @property
    def verdict(self) -> str:
        """What a mean gap of this size is the sign of, by the bands a run of Keel is watched with."""
        mean = self.statistics["abs_mean"]
        if mean <= BANDS["float32"].healthy_max:
            return f"a mean of {mean:.2g} nats a token is rounding, in float32 too"
        if mean <= BANDS["bfloat16"].healthy_max:
            return (
                f"a mean of {mean:.2g} nats a token is usual in bfloat16; in float32 rounding alone stays below "
                f"{BANDS['float32'].healthy_max:.0e}, so there something else differs"
            )
        return (
            f"a mean of {mean:.2g} nats a token is more than rounding explains in any type (bfloat16: "
            f"{BANDS['bfloat16'].healthy_max:g}); keel preflight looks for the cause"
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; what is not finite is null, secrets are taken out."""
        value = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "verdict": self.verdict,
            "recomputed": self.recomputed,
            "num_sequences": self.num_sequences,
            "num_trajectories": self.num_trajectories,
            "statistics": dict(self.statistics),
            "peers": [
                {**asdict(metric), "value": self.peers[metric.name], "healthy": _healthy(metric.healthy_max, value)}
                for metric in PEER_METRICS
                for value in (self.peers[metric.name],)
            ],
            "corrections": [asdict(each) for each in self.corrections],
            "worst": [asdict(each) for each in self.worst],
            "notes": list(self.notes),
        }
        found: dict[str, Any] = scrubbed_values(_finite(value))
        return found

    def __str__(self) -> str:
        side = f"; the learner's side recomputed with {one_line(self.recomputed)}" if self.recomputed else ""
        without = f"ESS without correction: {_percent(self.statistics['ess'])}"
        counts = f"{self.num_tokens:,} drawn tokens of {self.num_sequences:,} sequences"
        parts = [
            f"{self.kind}: {counts}{side}",
            self.verdict,
            "",
            *_table(("d = learner - engine, in nats", "value"), self._own_rows()),
            "",
            *_table(("the same, as others call it", "of", "value", "", "healthy, they say"), self._peer_rows()),
            "",
            *_table(("what a correction would have done", "masked", "capped", "lost", "mean", "ESS"), self._effects()),
            f"(masked, capped: of tokens; lost: trajectories with nothing left; {without})",
            "",
            *_table(("worst tokens", "place", "engine", "learner", "d", "token", "after"), self._worst_rows()),
            *(f"note: {one_line(note)}" for note in self.notes),
        ]
        return "\n".join(line.rstrip() for line in parts)

    def _repr_html_(self) -> str:
        return "".join(
            (
                cells.table(f"{self.kind}: {self.num_tokens:,} drawn tokens", ("figure", "value"), self._own_rows()),
                cells.table("as others call it", ("name", "of", "value", "", "healthy, they say"), self._peer_rows()),
                cells.table(
                    "what a correction would have done",
                    ("correction", "masked", "capped", "trajectories lost", "mean weight", "ESS"),
                    self._effects(),
                ),
                cells.table(
                    "worst tokens", ("where", "place", "engine", "learner", "d", "token", "after"), self._worst_rows()
                ),
            )
        )

    def _own_rows(self) -> list[tuple[str, str]]:
        return [(words, number(self.statistics[name])) for name, words in WORDS if name in self.statistics]

    def _peer_rows(self) -> list[tuple[str, ...]]:
        marks = {True: "ok", False: "above", None: ""}
        return [
            (
                metric.name,
                metric.peer,
                number(self.peers[metric.name]),
                marks[_healthy(metric.healthy_max, self.peers[metric.name])],
                metric.band,
            )
            for metric in PEER_METRICS
        ]

    def _effects(self) -> list[tuple[str, ...]]:
        return [
            (
                each.label,
                _percent(each.masked),
                _percent(each.truncated),
                _percent(each.trajectories_lost),
                number(each.weight_mean),
                _percent(each.ess),
            )
            for each in self.corrections
        ]

    def _worst_rows(self) -> list[tuple[str, ...]]:
        return [
            (
                one_line(scrubbed(each.where)),
                f"{each.position} of {each.length}",
                f"{each.rollout_logprob:.5g}",
                f"{each.learner_logprob:.5g}",
                f"{each.gap:+.3g}",
                _shown(each.text) if each.text is not None else f"id {each.token_id}",
                _shown(each.before or "", last=True),
            )
            for each in self.worst
        ]


def _healthy(limit: float | None, value: float) -> bool | None:
    """Whether `value` is what the peer calls healthy; None if it gives no number."""
    return None if limit is None else value <= limit


def _shown(text: str, *, last: bool = False) -> str:
    """Foreign text as one line of a terminal, its first or last characters, in quotes so that spaces are seen."""
    safe = scrubbed(text)  # whole, for half a secret would not be known as one
    return f"'{one_line(safe[-TEXT_LIMIT:] if last else safe, limit=TEXT_LIMIT)}'"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of columns as wide as their widest cell; the last is not padded."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
