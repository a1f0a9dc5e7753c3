"""The strip of invariants: what must hold on every step, and on how many it did."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keel.monitor.bands import MISMATCH, Band
from keel.report.plain import number
from keel.runs import Run

Row = Mapping[str, Any]


def from_rows(rows: Sequence[Row], healthy: Mapping[str, Band], *, updates_per_batch: int) -> list[dict[str, Any]]:
    """`{"name", "text", "held", "of", "ok"}` for each invariant that the rows speak of."""
    strip = [
        _strip("finite", "every number finite", [not row["not_finite"] for row in rows]),
        _strip("recompute", "a second pass gives the same bits", _zero(rows, "policy/recompute_max_dev")),
        _strip("mismatch", "engine and learner within the healthy band", _below(rows, healthy)),
        _strip("taken", "every update taken", _zero(rows, "policy/skipped")),
        _strip("failed", "failed worlds counted as failed", list(_failed_add_up(rows))),
        _strip("rows", "no row missing or doubled", _consecutive(rows)),
    ]
    if updates_per_batch == 1:
        strip.insert(0, _strip("ratio", "ratio exactly 1", _zero(rows, "policy/ratio_max_dev")))
    return [entry for entry in strip if entry["of"]]


def records_whole(run: Run) -> dict[str, Any]:
    """Both files of every recorded step are there, and as long as they say they are."""
    both = [
        _is_whole(run.paths.steps / f"{step:06d}.safetensors")
        and _ends_in_newline(run.paths.trajectories / f"{step:06d}.jsonl")
        for step in run.steps
    ]
    return _strip("records", "records whole", both)


def no_failed_world_is_zero(checked: Sequence[bool]) -> dict[str, Any]:
    """Of the records that were read: attempts that the world spoilt are not in the batch that was trained on."""
    return _strip("baseline", "no failed world counted as a reward of zero", checked)


def _strip(name: str, text: str, held: Sequence[bool]) -> dict[str, Any]:
    return {"name": name, "text": text, "held": sum(held), "of": len(held), "ok": all(held)}


def _zero(rows: Sequence[Row], name: str) -> list[bool]:
    """Rows that have the metric; one whose value is not finite has it, and does not hold."""
    return [number(row.get(name)) == 0 for row in rows if name in row]


def _below(rows: Sequence[Row], healthy: Mapping[str, Band]) -> list[bool]:
    limit = healthy[MISMATCH].healthy_max
    values = [number(row[MISMATCH]) for row in rows if MISMATCH in row]
    return [value is not None and value <= limit for value in values]


def _failed_add_up(rows: Sequence[Row]) -> Iterable[bool]:
    parts = ("rollout/env_error", "rollout/env_timeout", "rollout/engine_error")
    for row in rows:
        if "rollout/failed" in row and all(part in row for part in parts):
            yield number(row["rollout/failed"]) == sum(number(row[part]) or 0 for part in parts)


def _consecutive(rows: Sequence[Row]) -> list[bool]:
    before = 0
    held = []
    for row in rows:
        held.append(row["train_step"] == before + 1)
        before = row["train_step"]
    return held


def _is_whole(path: Path) -> bool:
    """A safetensors file is 8 bytes of header length, the header, and as much data as the header's offsets say."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            size = path.stat().st_size
            if length > size:
                return False
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return bool(size == 8 + length + max(ends, default=0))
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error, RecursionError):
        return False


def _ends_in_newline(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) == 0:
                return False
            file.seek(-1, 2)
            return file.read(1) == b"\n"
    except OSError:
        return False
