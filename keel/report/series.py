"""Rows of metrics.jsonl as columns, thinned where there are more than a page can draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from keel.report.plain import number

MAX_ROWS = 2_000
"""Rows that a page draws; a run with more is thinned, and its extremes stay."""
KEEPS_EXTREMES = (
    "reward/mean",
    "success",
    "policy/loss",
    "policy/entropy",
    "policy/grad_norm",
    "policy/ratio_max_dev",
    "policy/recompute_max_dev",
    "mismatch/abs_mean",
    "mismatch/abs_max",
    "rollout/signal_share",
    "rollout/failed",
    "time/step_s",
)
"""Metrics whose smallest and largest value in every stretch survives thinning."""
_HEAD = ("train_step", "stage", "step")
_LEFT_OUT = {"schema_version", "kind", "not_finite", *_HEAD}

Row = Mapping[str, Any]


def columns(rows: Sequence[Row], max_rows: int = MAX_ROWS, always: frozenset[int] = frozenset()) -> dict[str, Any]:
    """Step rows as `{"train_step": [..], "stage": [..], "step": [..], metric: [number or null, ..], ...}`.

    `always` are the train steps of rows that thinning must keep. `unix_s` is kept, with full seconds.
    """
    kept = [rows[index] for index in kept_rows(rows, max_rows, always)]
    names = list(dict.fromkeys(name for row in kept for name in row if name not in _LEFT_OUT))
    found: dict[str, Any] = {name: [_head(row, name) for row in kept] for name in _HEAD}
    for name in names:
        digits = 14 if name == "unix_s" else 6
        values = [number(row.get(name), digits) for row in kept]
        if any(value is not None for value in values) or any(name in row["not_finite"] for row in kept):
            found[name] = values
    return found


def kept_rows(rows: Sequence[Row], max_rows: int, always: frozenset[int] = frozenset()) -> list[int]:
    """Indices of the rows that are drawn: all, or the first and last, evenly spaced ones, and every stretch's extremes.

    The rows are cut into equal stretches, so many that the sum stays near `max_rows`; of each stretch the first row,
    the first with a value that is not finite, and per metric of `KEEPS_EXTREMES` those of its smallest and its largest
    value are kept.
    """
    if len(rows) <= max_rows:
        return list(range(len(rows)))
    stretches = max(1, max_rows // (2 * len(KEEPS_EXTREMES) + 2))
    bounds = [len(rows) * index // stretches for index in range(stretches + 1)]
    kept = {0, len(rows) - 1}
    kept |= {index for index, row in enumerate(rows) if row["train_step"] in always}
    for start, stop in pairwise(bounds):
        kept.add(start)
        kept.add(next((index for index in range(start, stop) if rows[index]["not_finite"]), start))
        for name in KEEPS_EXTREMES:
            values = ((number(rows[index].get(name)), index) for index in range(start, stop))
            here = [(value, index) for value, index in values if value is not None]
            kept |= {min(here)[1], max(here)[1]} if here else set()
    for index in range(0, len(rows), max(1, len(rows) // max(1, max_rows - len(kept)))):
        if len(kept) >= max_rows:
            break
        kept.add(index)
    return sorted(kept)


def _head(row: Row, name: str) -> int | str | None:
    value: int | str | None = row[name]
    return value
