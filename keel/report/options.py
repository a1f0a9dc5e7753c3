"""Which options two runs have different, out of their config.toml."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from keel.monitor.rows import RunDirectoryError
from keel.report.plain import cut, without_secrets
from keel.runs import Run

OWN = ("run_dir", "name")
"""Options that are a run's own and say nothing about what it does."""


def differing_options(first: Run, second: Run) -> list[dict[str, Any]]:
    """`[{"option", "a", "b"}]` in the order of the files, values as TOML writes them; null where a run has it not.

    A config.toml that cannot be read counts as empty; that is told of among the run's problems.
    """
    values = [dict(_flat(_read(run), "")) for run in (first, second)]
    names = [name for name in dict.fromkeys([*values[0], *values[1]]) if name not in OWN]
    return [
        {"option": cut(name, 200), "a": values[0].get(name), "b": values[1].get(name)}
        for name in names
        if values[0].get(name) != values[1].get(name)
    ]


def _read(run: Run) -> dict[str, Any]:
    try:
        return tomllib.loads(run.config_text)
    except (RunDirectoryError, ValueError, RecursionError) as error:
        run.problems.append(f"config.toml: {error}")
        return {}


def _flat(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _toml(name, value)


def _toml(name: str, value: Any) -> str:
    written = json.dumps(value, default=str, ensure_ascii=False)
    return cut(without_secrets(f"{name} = {written}").removeprefix(f"{name} = "), 2_000)
