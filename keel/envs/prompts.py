"""From a row of data to the first messages of an episode: a column, a template, or a function."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from keel.envs.rows import BadRowError, DataError, Row
from keel.types import Message, Role

PromptFunction = Callable[[Row], "str | Sequence[Message | Mapping[str, Any]]"]
USUAL_COLUMNS = ("prompt", "messages", "question")
"""Looked for, in this order, when no prompt is named."""
_MESSAGE_KEYS = ("role", "content", "name", "channel")


class NoPromptError(DataError):
    """No prompt is named, and the data has none of the usual columns; it has `columns`."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = columns
        super().__init__(
            f"no prompt is named, and the data has none of the columns {', '.join(USUAL_COLUMNS)} (it has: "
            f"{', '.join(columns)}); give prompt='<column>', a template '...{{column}}...', or a function"
        )


class Prompt:
    """Makes the first messages of a row.

    `spec` is the name of a column (text, or a chat: a list of {"role", "content"}), a template with {column} fields, or
    a function of the row that returns either. None takes the first of `USUAL_COLUMNS` that `columns` has. Raises
    DataError if it names a column that is not in `columns`.
    """

    def __init__(self, spec: str | PromptFunction | None, system: str, columns: Sequence[str]) -> None:
        self._system = system
        self._make: PromptFunction
        if callable(spec):
            self._make = spec
            return
        if spec is None:
            spec = next((column for column in USUAL_COLUMNS if column in columns), None)
            if spec is None:
                raise NoPromptError(columns)
        if spec in columns:
            self._make = _Column(spec)
            return
        fields = _fields(spec)
        if missing := [field for field in fields if field not in columns]:
            raise DataError(f"prompt has the field {{{missing[0]}}}, but the data has the columns {', '.join(columns)}")
        if not fields:
            raise DataError(
                f"prompt {spec!r} is neither a column (there are: {', '.join(columns)}) nor a template with {{column}}"
            )
        self._make = _Template(spec, fields)

    def messages(self, row: Row) -> tuple[Message, ...]:
        """The first messages. Raises BadRowError, and what the function raises."""
        return self._messages(self._make(row))

    def is_text(self, row: Row) -> bool:
        """Is the prompt one text, rather than a chat?"""
        return isinstance(self._make(row), str)

    def _messages(self, made: Any) -> tuple[Message, ...]:
        if isinstance(made, str):
            found: tuple[Message, ...] = (Message("user", made),)
        elif isinstance(made, list | tuple) and made:
            found = tuple(_message(item) for item in made)
        else:
            raise BadRowError(f"a prompt is a text or a list of messages; got {_short(made)}")
        if found[-1].role == "assistant":
            raise BadRowError(
                "the prompt ends with an assistant message, but the policy speaks next; cut it off: "
                "prompt=lambda row: row['messages'][:-1]"
            )
        if not self._system:
            return found
        if found[0].role in ("system", "developer"):
            raise BadRowError(f"the prompt begins with a {found[0].role} message of its own; leave system= out")
        return (Message("system", self._system), *found)


class _Column:
    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, row: Row) -> Any:
        if row.get(self._name) is None:
            raise BadRowError(_lacks(row, self._name))
        return row[self._name]


class _Template:
    def __init__(self, text: str, fields: Sequence[str]) -> None:
        self._text = text
        self._fields = fields

    def __call__(self, row: Row) -> str:
        for field in self._fields:
            if row.get(field) is None:
                raise BadRowError(_lacks(row, field))
        try:
            return self._text.format(**{field: row[field] for field in self._fields})
        except (ValueError, TypeError) as error:
            raise BadRowError(f"the template cannot format it: {error}") from error


def _fields(template: str) -> list[str]:
    """Names in braces; columns only, no attributes and no indices, so that a template reads nothing but the row."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        fix = "write braces that are text twice: {{ }}"
        raise DataError(f"prompt {template!r} is no template: {error}; {fix}") from error
    return list(dict.fromkeys(names))


def _message(item: Any) -> Message:
    if isinstance(item, Message):
        return item
    if not isinstance(item, Mapping) or "role" not in item or "content" not in item:
        raise BadRowError(f'a message is {{"role": ..., "content": ...}}; got {_short(item)}')
    strange = [key for key, value in item.items() if key not in _MESSAGE_KEYS and value not in (None, [], "")]
    if strange:
        raise BadRowError(f"a prompt's message has {', '.join(_MESSAGE_KEYS)}; got {strange[0]!r} in {_short(item)}")
    if item["role"] not in get_args(Role):
        raise BadRowError(f"a message's role is one of {', '.join(get_args(Role))}; got {_short(item['role'])}")
    return Message(item["role"], _text(item["content"]), channel=item.get("channel"), name=item.get("name"))


def _text(content: Any) -> str:
    """A message's text; chats written for models that see come in parts, of which only text is known here."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise BadRowError(f"a message's content is a text, and Keel trains on text alone; got {_short(content)}")


def _lacks(row: Row, column: str) -> str:
    return f"column {column!r} is {'null' if column in row else 'missing'} (the row has: {', '.join(row)})"


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 100 else text[:100] + '...'}"
