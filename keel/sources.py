"""The source of a run's own plug-ins, kept in its directory: RUN/sources/, with sources.json to say what is what.

Whatever an environment, a reward or a loss is, it can be read later what it was. The module of each is copied whole;
of what was written in a notebook or an interactive session, the cell. So are the modules and cells of the functions and
classes that it refers to, as far as names tell. Keel's own code, the standard library and installed packages are left
out: environment.json has their versions.
"""

from __future__ import annotations

import functools
import inspect
import json
import linecache
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from keel import plugins
from keel.config import TrainConfig
from keel.config_plugins import ALGO_ROOMS
from keel.monitor.rows import write_json, write_text
from keel.secrecy import scrubbed

INDEX = "sources.json"
MAX_OBJECTS = 200  # followed from one plug-in
MAX_CHARACTERS = 1_000_000  # of one source
_INSTALLED = tuple(
    str(Path(path).resolve()) + os.sep
    for path in (
        str(Path(__file__).parent),
        *(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    )
)


@dataclass(frozen=True, slots=True)
class Source:
    """A text that a plug-in comes from: the file or cell `origin`; `name` is its module's, or that of what a cell
    defines."""

    name: str
    origin: str
    text: str


def save_sources(config: TrainConfig, directory: Path) -> None:
    """Write the sources of the plug-ins of `config` to `directory`, if any are the user's own.

    A resumed run whose sources have changed has both: a source never replaces another. Needs the plug-ins to be found,
    as `keel.plugins.resolve` finds them.
    """
    entries = []
    for option, name, room in _plugins(config):
        target = plugins.resolve(name, room)
        found = list(sources_of(target))
        nowhere = not found and any(True for _ in _reached(target))
        note = "no source is available: it was not written to a file or a cell" if nowhere else ""
        if found or note:
            files = [_keep(directory, source) for source in found]
            entries.append({"option": option, "name": name, "files": files, **({"note": note} if note else {})})
    index = directory / INDEX
    before = json.loads(index.read_text(encoding="utf-8"))["sources"] if index.exists() else []
    entries = before + [entry for entry in entries if entry not in before]
    if entries != before:
        directory.mkdir(exist_ok=True)
        write_json(index, {"sources": entries})


def _plugins(config: TrainConfig) -> Iterator[tuple[str, str, str]]:
    """Option, name and room of every plug-in that a config names."""
    if config.env.id:
        yield "env.id", config.env.id, "keel.envs"
    if config.env.reward.id != "none":
        yield "env.reward", config.env.reward.id, "keel.rewards"
    for name, room in ALGO_ROOMS.items():
        value: Any = getattr(config.algo, name)
        for plugin in value if isinstance(value, tuple) else (value,):
            yield f"algo.{name}", plugin.id, room
    if config.warm_start.demonstrations:
        yield "warm_start.demonstrations", config.warm_start.demonstrations, "keel.envs"


def sources_of(target: Any) -> Iterator[Source]:
    """The texts that `target`, and what it refers to, come from: each once, its own first."""
    origins = set()
    for item in _reached(target):
        source = _source(item)
        if source is not None and source.origin not in origins:
            origins.add(source.origin)
            yield source


def _reached(target: Any) -> Iterator[Any]:
    """`target` and the functions, classes and modules of the user's that it leads to, nearest first."""
    waiting, seen = [target], set[int]()
    while waiting and len(seen) < MAX_OBJECTS:
        item = waiting.pop(0)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if _is_own(item):
            yield item
        if _is_own(item) or item is target or not isinstance(item, (FunctionType, type, ModuleType)):
            waiting += [other for other in _references(item) if _leads_on(other)]


def _references(item: Any) -> Iterable[Any]:
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, MethodType):
        return [item.__func__, item.__self__]
    if isinstance(item, FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
        named = [item.__globals__[name] for name in _names(item.__code__) if name in item.__globals__]
        wrapped = [item.__wrapped__] if hasattr(item, "__wrapped__") else []
        return [*wrapped, *cells, *named, *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]
    if isinstance(item, type):
        return [*item.__bases__, *(getattr(value, "__func__", value) for value in vars(item).values())]
    if isinstance(item, ModuleType):
        return []
    if isinstance(item, (list, tuple, set)):
        return list(item)[:MAX_OBJECTS]
    return [type(item), *getattr(item, "functions", ()), *getattr(item, "__dict__", {}).values()]  # of task_env


def _leads_on(item: Any) -> bool:
    """Data leads nowhere; what can be called, modules, and lists of such do."""
    return callable(item) or isinstance(item, (ModuleType, list, tuple, set))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False


def _names(code: CodeType) -> Iterator[str]:
    """Global names in a function and in those within it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _is_own(item: Any) -> bool:
    """A function, class or module that is neither Keel's nor Python's nor an installed package's."""
    if isinstance(item, functools.partial | MethodType) or not isinstance(item, FunctionType | type | ModuleType):
        return False
    name = item.__name__ if isinstance(item, ModuleType) else str(item.__module__)
    if name.partition(".")[0] in sys.stdlib_module_names and name != "__main__":
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is None or not str(Path(file).resolve()).startswith(_INSTALLED)


def _source(item: Any) -> Source | None:
    """The module's file, or the cell: `linecache` has what was typed in."""
    module = item if isinstance(item, ModuleType) else sys.modules.get(item.__module__)
    file = getattr(module, "__file__", None)
    path: str | None = file if file and file.endswith(".py") else _code_file(item)
    text = "".join(linecache.getlines(path)) if path else ""
    if not path or not text:
        return None
    if len(text) > MAX_CHARACTERS:
        text = text[:MAX_CHARACTERS] + "\n# cut here: longer than Keel keeps\n"
    text = scrubbed(text)
    return Source(Path(path).stem if path == file else item.__name__, path, text)


def _code_file(item: Any) -> str | None:
    """Where a function's code says that it was written; for a class, its first function's."""
    values = [inspect.unwrap(item)] if isinstance(item, FunctionType) else vars(item).values()
    functions = (getattr(value, "__func__", value) for value in values)
    return next((value.__code__.co_filename for value in functions if isinstance(value, FunctionType)), None)


def _keep(directory: Path, source: Source) -> str:
    """Write a source under a free name, or find its text written already; the name."""
    directory.mkdir(exist_ok=True)
    for path in sorted(directory.glob("*.py")):
        if path.read_text(encoding="utf-8") == source.text:
            return path.name
    stem = "".join(c if c.isalnum() or c in "_-" else "_" for c in source.name).strip("_")[:60] or "source"
    number = 1
    while (path := directory / (f"{stem}.py" if number == 1 else f"{stem}.{number}.py")).exists():
        number += 1
    write_text(path, source.text)
    return path.name
