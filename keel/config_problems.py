"""What is wrong with a config, said so that it can be mended: where, what, got, fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from keel import config_schema
from keel.config import ImpossibleConfigError, Plugin
from keel.config_schema import Path
from keel.types import UserFault

Where = Callable[[Path], str]
"""Turns an option's path into the file and line, or the `--set`, that gave it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault. `where` is file:line or the argument."""

    where: str
    what: str
    got: str
    fix: str

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}"]
        lines += [f"    {label}: {text}" for label, text in (("got", self.got), ("fix", self.fix)) if text]
        return "\n".join(lines)


class ConfigError(UserFault, ValueError):
    """A config that cannot be run; `problems` holds every fault that was found, not the first alone."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


def problems_of(error: ValidationError, where: Where) -> list[Problem]:
    """Pydantic's findings in our words."""
    found: list[Problem] = []
    for detail in error.errors(include_url=False):
        path = tuple(str(part) for part in detail["loc"])
        cause = (detail.get("ctx") or {}).get("error")
        if isinstance(cause, ImpossibleConfigError):
            found += [
                Problem(
                    " and ".join(dict.fromkeys(where(tuple(name.split("."))) for name in conflict.options)),
                    conflict.what,
                    conflict.got,
                    conflict.fix,
                )
                for conflict in cause.conflicts
            ]
        elif isinstance(cause, UserFault):  # a value that checks itself says what is wrong with it
            option = ".".join(part for part in path if not part.isdigit())
            what = f"{option} has a value it does not take"
            found.append(Problem(where(path), what, shown(detail["input"]), str(cause)))
        elif detail["type"] == "extra_forbidden":
            found.append(_unknown(path, detail["input"], where))
        else:
            found.append(_wrong_value(path, detail["input"], detail["msg"], where))
    return found


def _unknown(path: Path, value: Any, where: Where) -> Problem:
    holder = f"in [{'.'.join(path[:-1])}]" if path[:-1] else "at the top of the file"
    what = (
        f"unknown section [{'.'.join(path)}]" if isinstance(value, Mapping) else f"unknown option {path[-1]!r} {holder}"
    )
    return Problem(where(path), what, shown(value), nearest(path))


def nearest(path: Path) -> str:
    """What an unknown name was probably meant to be: here, in another section, or the list of what there is."""
    section = config_schema.section_at(path[:-1])
    names = list(section.model_fields) if section is not None else []
    near = get_close_matches(path[-1], names, n=1, cutoff=0.75)
    if near:
        return f"did you mean {near[0]!r}?"
    elsewhere = {name: home for name, home in _homes() if home != path[:-1]}
    far = (
        path[-1]
        if path[-1] in elsewhere
        else next(iter(get_close_matches(path[-1], elsewhere, n=1, cutoff=0.75)), None)
    )
    if far is not None:
        homes = [f"[{'.'.join(home)}]" if home else "the top of the file" for name, home in _homes() if name == far]
        return f"{far!r} belongs to {' or '.join(homes)}"
    near = get_close_matches(path[-1], names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(names)}"


def _homes() -> Iterator[tuple[str, Path]]:
    """Every option and section name with the section it stands in."""
    for table in config_schema.tables():
        if table.path:
            yield table.path[-1], table.path[:-1]
        for option in table.options:
            yield option.path[-1], option.path[:-1]


def _wrong_value(path: Path, value: Any, message: str, where: Where) -> Problem:
    # Pydantic's location ends inside a list or a plug-in; the option is the longest part that the schema knows.
    option = path
    while option and config_schema.field_at(option) is None:
        option = option[:-1]
    field = config_schema.field_at(option)
    if field is None:
        return Problem(where(path), ".".join(path) or "the config", shown(value), message)
    help_text = f" ({field.description})" if field.description else ""
    fix = f"{option[-1]} takes {config_schema.needs(field)}{help_text}"
    close = get_close_matches(value, _choices(fix), n=1) if isinstance(value, str) else []
    if close:
        fix = f"did you mean {close[0]!r}? {fix}"
    return Problem(where(path), f"{'.'.join(option)} has a value it does not take", shown(value), fix)


def _choices(needs: str) -> list[str]:
    return needs.split('"')[1::2]


def shown(value: Any) -> str:
    """A value as TOML with its type in words, shortened."""
    if isinstance(value, Plugin):
        value = value.model_dump()
    words = {
        bool: "a boolean",
        int: "a whole number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "a table",
    }
    try:
        text = config_schema.toml_value(value)
    except ValueError:
        text = repr(value)
    short = text if len(text) <= 80 else text[:77] + "..."
    kind = words.get(type(value))
    return f"{short} ({kind})" if kind else short
