"""Rows of somebody's data, from wherever they lie: JSONL, parquet, a list of mappings, a `datasets.Dataset`.

A row is a mapping of column names to JSON values. Rows are held once per process, as JSON lines or as the Arrow table
they came in, and turned into Python values one at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from keel.types import UserFault

Row = dict[str, Any]
SCAN_ROWS = 4096  # rows of an Arrow table turned into Python values at once
_MEDIA = ("Image", "Audio", "Video", "Pdf", "Nifti")
_EVAL_SPLITS = ("test", "validation", "eval")
_INSTALL = "pip install 'keel-rl[data]'"


# Made once: json.dumps and json.loads with options make one more at every call.
_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class DataError(UserFault, ValueError):
    """Data that no tasks can be made of; says which row of which file, what is wrong, and how to mend it."""


class BadRowError(ValueError):
    """One row cannot be used; the text is the reason, without the place."""


class Rows(Protocol):
    """Rows of one source. `name` is how messages call it."""

    name: str

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """How a message names row `index`: "train.jsonl:157", or "data[156]"."""
        ...

    def row(self, index: int) -> Row:
        """Row `index`. Raises BadRowError."""
        ...

    def scan(self) -> Iterator[Row | BadRowError]:
        """All rows in order, with the reason in place of one that cannot be read."""
        ...


class JsonRows:
    """Rows kept as JSON texts; `numbers` are their line numbers in the file, None for a list."""

    def __init__(self, name: str, lines: Sequence[bytes | BadRowError], numbers: Sequence[int] | None) -> None:
        self.name = name
        self._lines = lines
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._lines)

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]" if self._numbers is None else f"{self.name}:{self._numbers[index]}"

    def row(self, index: int) -> Row:
        line = self._lines[index]
        if isinstance(line, BadRowError):
            raise line
        return _parse(line)

    def scan(self) -> Iterator[Row | BadRowError]:
        for index in range(len(self)):
            try:
                yield self.row(index)
            except BadRowError as error:
                yield error


class ArrowRows:
    """Rows of an Arrow table, which stays as it is."""

    def __init__(self, name: str, table: Any) -> None:
        self.name = name
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"

    def row(self, index: int) -> Row:
        found: Row = self._table.slice(index, 1).to_pylist()[0]
        return found

    def scan(self) -> Iterator[Row | BadRowError]:
        for start in range(0, len(self), SCAN_ROWS):
            yield from self._table.slice(start, SCAN_ROWS).to_pylist()


class DatasetRows:
    """Rows of a `datasets.Dataset`, which reads them from its own memory map."""

    def __init__(self, name: str, dataset: Any) -> None:
        self.name = name
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def where(self, index: int) -> str:
        return f"{self.name}, row {index}"

    def row(self, index: int) -> Row:
        return dict(self._dataset[index])

    def scan(self) -> Iterator[Row | BadRowError]:
        return (dict(row) for row in self._dataset)


def open_rows(data: Any, columns: Sequence[str] | None, *, name: str = "data") -> Rows:
    """The rows of `data`: a path (.parquet, else JSON lines), a sequence of mappings, or a `datasets.Dataset`.

    With `columns` all other columns are left out. Raises DataError for a source that cannot be read or that is empty.
    """
    rows = _open(data, columns, name)
    if len(rows) == 0:
        raise DataError(f"{rows.name} has no rows; there is nothing to make tasks of")
    return rows


def both_splits(data: Any, eval_data: Any) -> tuple[Any, Any]:
    """`data` and `eval_data`, taken out of a mapping of splits if it is one. Raises DataError."""
    if not isinstance(data, Mapping):
        return data, eval_data
    if "train" not in data:
        raise DataError(f'a mapping of splits needs "train"; got {", ".join(map(str, data)) or "nothing"}')
    if eval_data is None:
        eval_data = next((data[name] for name in _EVAL_SPLITS if name in data), None)
    return data["train"], eval_data


def canonical(row: Mapping[str, Any]) -> bytes:
    """The one JSON text of a row's content, whatever order its columns are in. Raises BadRowError if it has none."""
    try:
        return _ENCODER.encode(row).encode()
    except (TypeError, ValueError, RecursionError) as error:  # ValueError: NaN, a cycle, half of a surrogate pair
        raise BadRowError(_not_json(row) or f"it is not JSON: {error}") from error


def _open(data: Any, columns: Sequence[str] | None, name: str) -> Rows:
    if isinstance(data, str | Path):
        return _open_file(Path(data), columns)
    if _is_from_datasets(data):
        return _open_dataset(data, columns, name)
    if isinstance(data, Mapping) or not isinstance(data, Iterable) or not hasattr(data, "__len__"):
        raise DataError(
            f"{name} is a {type(data).__name__}; give the path of a .jsonl or .parquet file, a list of dicts (one a "
            "row), or a datasets.Dataset"
        )
    return JsonRows(name, [_as_line(row, columns) for row in data], None)


def _open_file(path: Path, columns: Sequence[str] | None) -> Rows:
    if not path.is_file():
        raise DataError(f"there is no file {path} (looked for from {Path.cwd()})")
    if path.suffix == ".parquet":
        return ArrowRows(path.name, _read_parquet(path, columns))
    if path.suffix in (".csv", ".tsv", ".gz", ".zst", ".arrow"):
        raise DataError(f"{path} is neither JSON lines nor parquet; read it yourself and give the rows as a list")
    lines, numbers = list[bytes | BadRowError](), list[int]()
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            lines.append(_narrowed(line, columns) if columns is not None else line)
            numbers.append(number)
    return JsonRows(str(path), lines, numbers)


def _narrowed(line: bytes, columns: Sequence[str]) -> bytes | BadRowError:
    try:
        return _as_line(_parse(line), columns)
    except BadRowError as error:
        return error


def _as_line(row: Any, columns: Sequence[str] | None) -> bytes | BadRowError:
    """A row given as a mapping, as JSON; the reason if it is none."""
    if not isinstance(row, Mapping):
        return BadRowError(f"it is a {type(row).__name__}, not a mapping of columns to values")
    if strange := [key for key in row if not isinstance(key, str)]:
        return BadRowError(f"column names are strings; got {strange[0]!r}")
    try:
        return canonical({key: row[key] for key in columns if key in row} if columns is not None else dict(row))
    except BadRowError as error:
        return error


def _parse(line: bytes) -> Row:
    try:
        value = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        raise BadRowError(f"it is not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        hint = "; is the file one JSON array? write one object a line" if isinstance(value, list) else ""
        raise BadRowError(f"it is a JSON {type(value).__name__}, not an object{hint}")
    return value


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _read_parquet(path: Path, columns: Sequence[str] | None) -> Any:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"reading {path.name} needs pyarrow: {_INSTALL} (JSONL and lists need nothing)") from error
    try:
        return parquet.read_table(path, columns=list(columns) if columns is not None else None, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def _is_from_datasets(data: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "datasets" for kind in type(data).__mro__)


def _open_dataset(data: Any, columns: Sequence[str] | None, name: str) -> Rows:
    if not hasattr(data, "__len__") or isinstance(data, Mapping):
        raise DataError(
            f"{name} is a {type(data).__name__}, which has no order or no length; give a datasets.Dataset: for a "
            "stream datasets.Dataset.from_list(list(stream.take(1000)))"
        )
    if columns is not None:
        data = data.select_columns([column for column in columns if column in data.column_names])
    for column, feature in data.features.items():
        if type(feature).__name__ in _MEDIA:
            left = [other for other in data.column_names if other != column]
            raise DataError(
                f"{name}: column {column!r} holds {type(feature).__name__.lower()}s, and Keel trains on text; "
                f"leave it out with columns={left}"
            )
    return DatasetRows(name, data.with_format(None))


def _not_json(row: Mapping[str, Any]) -> str:
    """Which column is to blame for a row that is not JSON, and why."""
    for column, value in row.items():
        problem = _problem(value)
        if problem:
            return f"column {column!r} {problem}; leave the column out with columns=[...], or convert it"
    return ""


def _problem(value: Any) -> str:
    if isinstance(value, Mapping):
        return next((found for inner in value.values() if (found := _problem(inner))), "")
    if isinstance(value, list | tuple):
        return next((found for inner in value if (found := _problem(inner))), "")
    if isinstance(value, bytes):
        return "holds bytes (an image, perhaps), which are no JSON value"
    if isinstance(value, float) and not math.isfinite(value):
        return f"holds {value}, which is no JSON number"
    if isinstance(value, str):
        return "" if value.isascii() or _encodes(value) else "holds half of a surrogate pair, which is no text"
    if value is None or isinstance(value, bool | int | float):
        return ""
    return f"holds a {type(value).__name__}, which is no JSON value"


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
