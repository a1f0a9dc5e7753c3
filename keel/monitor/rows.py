"""Files that survive a kill: JSON replaced whole, JSON lines appended and synced. Secrets are taken out of all of it.

A line of metrics.jsonl is complete if it ends in a newline. A kill may leave a torn last line; readers leave it out
and `truncate_rows` cuts it off.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keel.files import write_whole
from keel.secrecy import scrubbed, scrubbed_values
from keel.types import UserFault

SCHEMA_VERSION = 1
"""Version of the run directory's contract (docs/loop.md); raised when a name or a meaning changes."""


class RunDirectoryError(UserFault, RuntimeError):
    """A run directory cannot be made, taken over or read; says what, got and how to fix."""


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`; a reader sees the old or the new text, never a part."""
    write_whole(path, scrubbed(text).encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` by `value` and the schema version."""
    text = json.dumps(scrubbed_values({"schema_version": SCHEMA_VERSION, **value}), indent=2, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; raises RunDirectoryError if it is missing, broken or of another schema."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
        found = value.get("schema_version") if isinstance(value, dict) else None
        raise RunDirectoryError(
            f"{path}: schema_version is {found!r}, this Keel reads {SCHEMA_VERSION}; use the Keel that wrote it"
        )
    return value


def plain_numbers(metrics: Mapping[str, float | int | None]) -> dict[str, Any]:
    """JSON has no NaN or infinity: such values become null and are spelled out under "not_finite"."""
    row: dict[str, Any] = {}
    not_finite = {}
    for name, value in metrics.items():
        if value is not None and not math.isfinite(value):
            not_finite[name] = str(float(value))
            row[name] = None
        else:
            row[name] = value
    if not_finite:
        row["not_finite"] = not_finite
    return row


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line and wait until it is on disk. One that fails (no space left) leaves nothing of itself behind."""
    line = json.dumps(scrubbed_values({"schema_version": SCHEMA_VERSION, **row}), allow_nan=False) + "\n"
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(line.encode())
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(end)
            raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete rows; a torn last line is left out. Raises RunDirectoryError for a broken line before it."""
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunDirectoryError(f"{path}:{number}: not a JSON row: {error}") from error
    return rows


def truncate_rows(path: Path, num_rows: int) -> None:
    """Keep the first `num_rows` rows and nothing after them.

    Raises RunDirectoryError if there are fewer: then rows of a finished step were lost, which must not pass silently.
    """
    data = path.read_bytes() if path.exists() else b""
    complete = data.count(b"\n")
    if complete < num_rows:
        raise RunDirectoryError(
            f"{path}: has {complete} rows, the checkpoint was saved after {num_rows}; rows were lost"
        )
    end = 0
    for _ in range(num_rows):
        end = data.index(b"\n", end) + 1
    if end == len(data):
        return
    with path.open("r+b") as file:
        file.truncate(end)
        file.flush()
        os.fsync(file.fileno())
