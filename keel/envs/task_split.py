"""Rows to tasks: each checked once, equal ones merged, and parted into a train and a held-out split by content."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, overload

from keel.envs.prompts import Prompt
from keel.envs.rows import BadRowError, DataError, Row, Rows, canonical
from keel.types import Message, Task

OnBadRow = Literal["refuse", "skip"]


class TaskList(Sequence[Task]):
    """Tasks at some rows, made when they are asked for."""

    def __init__(self, rows: Rows, positions: Sequence[int]) -> None:
        self._rows = rows
        self._positions = array("q", positions)

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        if isinstance(index, slice):
            return TaskList(self._rows, self._positions[index])
        row = self._rows.row(self._positions[index])
        return Task(_digest(canonical(row)).hex(), row)


@dataclass(frozen=True, slots=True)
class Split:
    """Tasks of both splits, in an order of their content, and what became of the other rows."""

    train: TaskList
    eval: TaskList
    num_duplicates: int
    num_skipped: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A row that can be used. `content` is a hash of all of it, `prompt` of the messages it makes."""

    position: int
    content: bytes
    prompt: bytes


class _Scan:
    """One pass over rows: usable ones, without repetitions, in an order that is that of their content."""

    def __init__(self, rows: Rows, prompt: Prompt, needed: Sequence[str], on_bad_row: OnBadRow) -> None:
        self.rows = rows
        self.num_skipped = 0
        self.first_reason = ""
        found: dict[bytes, _Entry] = {}
        num_good = 0
        for position, row in enumerate(rows.scan()):
            try:
                entry = _entry(position, row, prompt, needed)
            except BadRowError as error:
                self._refuse(position, error, on_bad_row)
                continue
            num_good += 1
            found.setdefault(entry.content, entry)
        if not found:
            raise DataError(f"no row of {rows.name} can be used; the first: {self.first_reason}")
        self.entries = sorted(found.values(), key=lambda entry: entry.content)
        self.num_duplicates = num_good - len(found)
        if self.num_skipped:
            text = f"{rows.name}: skipped {self.num_skipped} of {len(rows)} rows; the first: {self.first_reason}"
            warnings.warn(text, stacklevel=2)

    def _refuse(self, position: int, error: BadRowError, on_bad_row: OnBadRow) -> None:
        reason = f"{self.rows.where(position)}: {error}"
        if on_bad_row == "refuse":
            fix = 'mend the row, or leave such rows out with on_bad_row="skip"'
            raise DataError(f"{reason}\n  fix:  {fix}") from error
        self.num_skipped += 1
        self.first_reason = self.first_reason or reason

    def prompts(self) -> set[bytes]:
        return {entry.prompt for entry in self.entries}

    def tasks(self, entries: Sequence[_Entry]) -> TaskList:
        return TaskList(self.rows, [entry.position for entry in entries])


def split_by_content(
    rows: Rows, prompt: Prompt, *, share: float, seed: int, needed: Sequence[str], on_bad_row: OnBadRow
) -> Split:
    """Hold out `share` of the tasks: those whose prompts have the lowest hashes under `seed`.

    The order of rows changes nothing, and rows with the same prompt, whatever else they hold, stay together, so that no
    held-out prompt is trained on. At least one is held out if `share` is above 0 and there are two.
    """
    scan = _Scan(rows, prompt, needed, on_bad_row)
    ranked = sorted(scan.prompts(), key=lambda each: blake2b(each, digest_size=8, key=str(seed).encode()).digest())
    count = round(share * len(ranked))
    if share > 0 and len(ranked) > 1:
        count = max(count, 1)
    held_out = set(ranked[:count])
    parts = [[entry for entry in scan.entries if (entry.prompt in held_out) is wanted] for wanted in (False, True)]
    return Split(scan.tasks(parts[0]), scan.tasks(parts[1]), scan.num_duplicates, scan.num_skipped)


def split_as_given(
    rows: Rows, eval_rows: Rows, prompt: Prompt, *, needed: Sequence[str], on_bad_row: OnBadRow
) -> Split:
    """Train on `rows` and hold out `eval_rows`; a prompt that is in both is not trained on, with a warning."""
    train = _Scan(rows, prompt, needed, on_bad_row)
    held_out = _Scan(eval_rows, prompt, needed, on_bad_row)
    taken = held_out.prompts()
    kept = [entry for entry in train.entries if entry.prompt not in taken]
    if len(kept) < len(train.entries):
        shared = len(train.entries) - len(kept)
        warnings.warn(f"{shared} tasks of {rows.name} are in {eval_rows.name} too and are not trained on", stacklevel=2)
    duplicates = train.num_duplicates + held_out.num_duplicates
    skipped = train.num_skipped + held_out.num_skipped
    return Split(train.tasks(kept), held_out.tasks(held_out.entries), duplicates, skipped)


def columns_of(rows: Rows) -> list[str]:
    """The columns of the first row that can be read. Raises DataError if there is none."""
    reason = ""
    for position, row in enumerate(rows.scan()):
        if not isinstance(row, BadRowError):
            return list(row)
        reason = reason or f"{rows.where(position)}: {row}"
    raise DataError(f"no row of {rows.name} can be used; the first: {reason}")


def _entry(position: int, row: Row | BadRowError, prompt: Prompt, needed: Sequence[str]) -> _Entry:
    if isinstance(row, BadRowError):
        raise row
    content = _digest(canonical(row))
    try:
        messages = prompt.messages(row)
    except BadRowError:
        raise
    except Exception as error:  # a prompt function of the user's
        raise BadRowError(f"the prompt function raised {type(error).__name__}: {error}") from error
    for column in needed:
        if row.get(column) is None:
            raise BadRowError(f"column {column!r} is {'null' if column in row else 'missing'}")
    return _Entry(position, content, _digest(_as_bytes(messages)))


def _as_bytes(messages: Sequence[Message]) -> bytes:
    return repr([(message.role, message.channel, message.name, message.content) for message in messages]).encode()


def _digest(content: bytes) -> bytes:
    return blake2b(content, digest_size=8, person=b"keel-task").digest()
