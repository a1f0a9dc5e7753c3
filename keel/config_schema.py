"""The config's schema as plain facts: every option's path, type, limits, default and help.

Error messages, the documented TOML and docs/config.md are all made from these, so none of them can drift.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import tomlkit
from pydantic.fields import FieldInfo

from keel.config import Plugin, Section, TrainConfig
from keel.distortion import Distortion

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Option:
    """One option. `needs` says what values it takes, `default` is TOML."""

    path: Path
    needs: str
    default: str
    help: str

    @property
    def name(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True, slots=True)
class Table:
    """One section: its path ("" is the top), help and options, without those of sections inside it."""

    path: Path
    help: str
    options: tuple[Option, ...]


def tables(section: type[Section] = TrainConfig, path: Path = (), text: str = "") -> Iterator[Table]:
    """Every section in the order of config.py, the top first."""
    inner = []
    options = []
    default = section()
    for name, field in section.model_fields.items():
        kind = section_type(field)
        if kind is not None:
            inner.append((kind, (*path, name), field.description or ""))
        else:
            value = toml_value(getattr(default, name))
            options.append(Option((*path, name), needs(field), value, field.description or ""))
    yield Table(path, text, tuple(options))
    for kind, inner_path, description in inner:
        yield from tables(kind, inner_path, description)


def section_type(field: FieldInfo) -> type[Section] | None:
    """The section class of a field, or None for a plain option."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def field_at(path: Path) -> FieldInfo | None:
    """The field at `path` of the config, or None; a plug-in's or an environment's own options have none."""
    section: type[Section] | None = TrainConfig
    field = None
    for name in path:
        if section is None or name not in section.model_fields:
            return None
        field = section.model_fields[name]
        section = section_type(field)
    return field


def section_at(path: Path) -> type[Section] | None:
    """The section class at `path`, or None."""
    if not path:
        return TrainConfig
    field = field_at(path)
    return section_type(field) if field is not None else None


def needs(field: FieldInfo) -> str:
    """What a field takes, for people: "a whole number >= 1"."""
    limits = []
    for constraint in field.metadata:
        for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            bound = getattr(constraint, attribute, None)
            if bound is not None:
                limits.append(f"{sign} {bound}")
    return " ".join([type_words(field.annotation), " and ".join(limits)]).strip()


def type_words(kind: Any) -> str:
    """A type in plain words."""
    simple: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    simple[Distortion] = "a table { cause = ..., strength = ..., seed = ..., group = ..., layer = ... }"
    if kind in simple:
        return simple[kind]
    origin = get_origin(kind)
    if origin is Literal:
        return "one of " + ", ".join(toml_value(value) for value in get_args(kind))
    if kind == tuple[Plugin, ...]:
        return f"{type_words(Plugin)}, or a list of them"
    if origin in (tuple, list):
        return f"a list, each {type_words(get_args(kind)[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(part) for part in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Plugin):
        return "a plug-in: a name, or a table { id = ..., its options }"
    if origin is dict or (isinstance(kind, type) and issubclass(kind, (dict, Section))):
        return "a table"
    return getattr(kind, "__name__", str(kind))


def toml_value(value: Any) -> str:
    """A value as TOML, tables inline. Raises ValueError for what TOML has no word for (None)."""
    if value is None:
        raise ValueError("TOML has no null; leave the option out instead")
    if isinstance(value, Plugin):
        return toml_value(value.model_dump())
    if isinstance(value, Distortion):
        return toml_value({name: part for name, part in value.to_json().items() if part is not None})
    if isinstance(value, Mapping):
        pairs = [f"{tomlkit.key([str(key)]).as_string()} = {toml_value(inner)}" for key, inner in value.items()]
        return "{ " + ", ".join(pairs) + " }" if pairs else "{}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(inner) for inner in value) + "]"
    return str(tomlkit.item(value).as_string())
