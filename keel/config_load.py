"""TOML and `--set` to a checked TrainConfig, and back.

`load` finds every fault it can before it raises one ConfigError: TOML syntax, unknown names, wrong values,
impossible combinations, plug-ins that do not exist or do not take an option.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from keel import config_schema
from keel.config import Plugin, TrainConfig
from keel.config_lines import find_lines
from keel.config_plugins import check_plugins
from keel.config_problems import ConfigError, Problem, Where, problems_of
from keel.config_recipes import recipe_text

Sets = Sequence[str]


def load(path: str | Path | None = None, sets: Sets = ()) -> TrainConfig:
    """The config of a TOML file (None: all defaults) with `--set` arguments "section.option=value" on top.

    The bare name of a recipe (`qwen3_0.6b`) stands for its file, unless there is a file of that name here. Raises
    ConfigError with every fault found.
    """
    if path is None:
        return parse("", "defaults", sets)
    return parse(read_text(Path(path)), str(path), sets)


def parse(text: str, source: str = "config", sets: Sets = (), *, resolve_plugins: bool = True) -> TrainConfig:
    """As `load`, from TOML text; `source` names it in messages.

    Without `resolve_plugins` no plug-in is imported or checked: for a config that is read, not run.
    """
    config, where = parse_located(text, source, sets)
    problems = check_plugins(config, where) if resolve_plugins else []
    if problems:
        raise ConfigError(problems)
    return config


def parse_located(text: str, source: str, sets: Sets = ()) -> tuple[TrainConfig, Where]:
    """The config of TOML text, its plug-ins unchecked, and what tells where in it an option was given."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([_syntax_problem(source, text, error)]) from error
    lines = find_lines(text)
    origins: dict[config_schema.Path, str] = {}
    problems = []
    for argument in sets:
        problem = _apply_set(data, argument, origins)
        if problem is not None:
            problems.append(problem)
    if problems:
        raise ConfigError(problems)

    def where(option: config_schema.Path) -> str:
        for length in range(len(option), 0, -1):
            if option[:length] in origins:
                return origins[option[:length]]
            if option[:length] in lines:
                return f"{source}:{lines[option[:length]]}"
        return next((origins[path] for path in origins if path[: len(option)] == option), source)

    return validate(data, where), where


def validate(data: Mapping[str, Any], where: Where) -> TrainConfig:
    """Check types, names and combinations, strictly: a string is never taken for a number."""
    dates = [
        Problem(where(path), f"{'.'.join(path)} is a date", str(value), "no option takes dates; put it in quotes")
        for path, value in _values(data)
        if isinstance(value, (dt.date, dt.time))
    ]
    if dates:
        raise ConfigError(dates)
    try:
        # Through JSON, because TOML has lists where the schema has tuples, and nothing else is to be converted.
        return TrainConfig.model_validate_json(json.dumps(_with_plugin_ids(data)), strict=True)
    except ValidationError as error:
        raise ConfigError(problems_of(error, where)) from error


def require(config: TrainConfig, options: Sequence[str], source: str) -> None:
    """Raise ConfigError for options that this command cannot do without but the config leaves empty.

    "a|b" asks for one of two.
    """
    problems = []
    for alternatives in options:
        names = alternatives.split("|")
        if not any(_value_at(config, name) for name in names):
            fields = [config_schema.field_at(tuple(name.split("."))) for name in names]
            help_texts = [f"{name}: {field.description}" for name, field in zip(names, fields, strict=True) if field]
            fix = f"set {', or '.join(help_texts)}"
            problems.append(Problem(source, f"{' or '.join(names)} is needed and not given", "", fix))
    if problems:
        raise ConfigError(problems)


def _value_at(config: TrainConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def dump(config: TrainConfig) -> str:
    """The whole config as TOML with help comments; `parse(dump(config))` is `config`."""
    blocks = []
    for table in config_schema.tables():
        section: Any = config
        for name in table.path:
            section = getattr(section, name)
        lines = [f"# {table.help}", f"[{'.'.join(table.path)}]"] if table.path else []
        for option in table.options:
            name = option.path[-1]
            lines.append(f"{name} = {config_schema.toml_value(getattr(section, name))}  # {option.help}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _values(value: Any, path: config_schema.Path = ()) -> Iterator[tuple[config_schema.Path, Any]]:
    """Every value in tables and lists, with the path of the option that holds it."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _values(inner, (*path, name))
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner, path)
    else:
        yield path, value


def read_text(path: Path) -> str:
    """The text of a config file, or of the recipe of that name if there is no such file. Raises ConfigError."""
    recipe = None if path.exists() else recipe_text(str(path))
    if recipe is not None:
        return recipe
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            [
                Problem(
                    str(path), "cannot be read", str(error), "give the path of a TOML file, or a name of `keel recipes`"
                )
            ]
        ) from error


def _syntax_problem(source: str, text: str, error: tomllib.TOMLDecodeError) -> Problem:
    found = re.search(r"\(at line (\d+), column \d+\)", str(error))
    number = int(found[1]) if found else max(1, len(text.splitlines()))
    line = text.splitlines()[number - 1].strip() if text.splitlines() else ""
    what = str(error).partition(" (at ")[0]
    return Problem(f"{source}:{number}", f"not TOML: {what}", line, 'strings need quotes: name = "value"')


def _apply_set(data: dict[str, Any], argument: str, origins: dict[config_schema.Path, str]) -> Problem | None:
    """Put one `--set` argument into `data`; the problem if it cannot be read."""
    where = f"--set {argument}"
    dotted, equals, text = argument.partition("=")
    path = tuple(part.strip() for part in dotted.split("."))
    if not equals or not all(path):
        return Problem(where, "not an assignment", argument, "write --set section.option=value")
    try:
        value = _set_value(text.strip())
    except tomllib.TOMLDecodeError as error:
        return Problem(where, f"the value is not TOML: {error}", text, "quote it for the shell: --set 'name=[1, 2]'")
    table: Any = data
    for depth, part in enumerate(path[:-1], start=1):
        inner = table.get(part, {})
        if isinstance(inner, str) and _is_plugin(path[:depth]):
            inner = {"id": inner}
        if not isinstance(inner, dict):
            return Problem(where, f"{'.'.join(path[:depth])} is not a section", argument, "drop what follows it")
        table[part] = inner
        table = inner
    table[path[-1]] = value
    origins[path] = where
    return None


def _set_value(text: str) -> Any:
    """TOML syntax; a word that is none is a string, so that `--set name=first` needs no nested quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if not text or text[0] in "[{\"'" or "\n" in text:
            raise
        return text


def _is_plugin(path: config_schema.Path) -> bool:
    field = config_schema.field_at(path)
    return field is not None and field.annotation in (Plugin, tuple[Plugin, ...])


def _with_plugin_ids(data: Mapping[str, Any]) -> dict[str, Any]:
    """Options without an id are options of the default plug-in: `[algo.loss] clip_high = 0.28`."""
    algo = data.get("algo")
    if not isinstance(algo, Mapping):
        return dict(data)
    defaults = TrainConfig().algo
    filled = dict(algo)
    for name, value in algo.items():
        default = getattr(defaults, name, None)
        if isinstance(default, Plugin) and isinstance(value, Mapping) and "id" not in value:
            filled[name] = {**value, "id": default.id}
    return {**data, "algo": filled}
