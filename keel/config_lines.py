"""On which line of a TOML file each key stands. The standard library's reader does not tell."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

KeyPath = tuple[str, ...]


def find_lines(text: str) -> dict[KeyPath, int]:
    """Line (from 1) of every table header and every key, inline tables included; `text` must be valid TOML.

    A statement is the shortest run of lines that is TOML by itself, so brackets and # inside strings, dotted keys and
    values over several lines need no rules of their own. A key's line is where its statement starts.
    """
    found: dict[KeyPath, int] = {}
    header: KeyPath = ()
    statement = ""
    start = 0
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not statement:
            start = number
        statement += line
        try:
            data = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue
        if statement.lstrip().startswith("["):
            header = _header(data)
            found.setdefault(header, start)
        else:
            for path in _paths(data):
                found.setdefault(header + path, start)
        statement = ""
    return found


def _header(data: Any) -> KeyPath:
    """The only path in the table that a header alone makes."""
    path: list[str] = []
    while data:
        if isinstance(data, list):
            data = data[0]
            continue
        name, data = next(iter(data.items()))
        path.append(name)
    return tuple(path)


def _paths(data: Mapping[str, Any]) -> Iterator[KeyPath]:
    for name, value in data.items():
        yield (name,)
        if isinstance(value, Mapping):
            for inner in _paths(value):
                yield (name, *inner)
