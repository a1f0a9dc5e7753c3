"""Tool calls in the text of a reply, as models without Harmony write them.

Two styles are read: Hermes (`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one or more, after any text),
and a reply that is nothing but JSON: one `{"name", "arguments"}` (or `"parameters"`), a list of them, or OpenAI's
`{"tool_calls": [{"type": "function", "function": {...}}]}`. Thoughts stand before the rest, as `<think>...</think>`, or
without the opening mark where the prompt has already written it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from keel.chat.tokenizer import ChatFormatError
from keel.chat.typescript import FUNCTIONS
from keel.types import Message

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_MARK = re.compile(r"</?tool_call>")
_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*')
_CALL_KEYS = frozenset({"name", "arguments", "parameters", "id", "type", "function"})
_NAME = re.compile(r"[\w.:/-]+")
_DECODER = json.JSONDecoder()


class MalformedTextError(Exception):
    """A reply's text cannot be read; its text is the reason."""


def read_messages(text: str, *, thinking: bool) -> list[Message]:
    """The messages of a reply's text, special tokens already gone: thoughts, then plain text, then calls.

    `thinking` says that the prompt ended inside `<think>`. Raises MalformedTextError, and RecursionError for JSON
    nested as deeply as only a policy gone astray writes it.
    """
    thoughts, answer = _split_thoughts(text, thinking=thinking)
    messages = [Message("assistant", thoughts, channel="analysis")] if thoughts is not None else []
    calls = _hermes_calls(answer) if _MARK.search(answer) else _json_calls(answer)
    if calls is None:
        return [*messages, Message("assistant", answer)]
    spoken = answer[: answer.index("<tool_call>")].removesuffix("\n") if "<tool_call>" in answer else ""
    if spoken:
        messages.append(Message("assistant", spoken))
    return [*messages, *calls]


def write_call(message: Message) -> str:
    """A call as Hermes text. Raises ChatFormatError unless its content is a JSON object."""
    name = json.dumps(bare_name(message.recipient or ""), ensure_ascii=False)
    call_arguments(message)
    return f'<tool_call>\n{{"name": {name}, "arguments": {message.content}}}\n</tool_call>'


def bare_name(name: str) -> str:
    """The name a template knows a tool by: without `functions.`."""
    return name.removeprefix(f"{FUNCTIONS}.")


def call_arguments(message: Message) -> dict[str, Any]:
    """A call's arguments. Raises ChatFormatError unless its content is a JSON object."""
    try:
        arguments = json.loads(message.content)
    except ValueError as error:
        raise ChatFormatError(f"template: a call's content must be a JSON object, got {message.content!r}") from error
    if not isinstance(arguments, dict):
        raise ChatFormatError(f"template: a call's content must be a JSON object, got {message.content!r}")
    return arguments


def _split_thoughts(text: str, *, thinking: bool) -> tuple[str | None, str]:
    opened = text.startswith("<think>")
    if not (opened or thinking):
        return None, text
    inner = text.removeprefix("<think>")
    thoughts, closed, answer = inner.partition("</think>")
    if not closed:
        raise MalformedTextError("<think> without </think>")
    thoughts = thoughts.removeprefix("\n").removesuffix("\n")
    # An empty pair of marks is how such templates write that nothing was thought.
    return thoughts or None, answer.removeprefix("\n\n") if answer.startswith("\n\n") else answer.removeprefix("\n")


def _hermes_calls(answer: str) -> list[Message]:
    marks = _MARK.findall(answer)
    if marks != ["<tool_call>", "</tool_call>"] * (len(marks) // 2):
        raise MalformedTextError("<tool_call> and </tool_call> do not pair up")
    after = answer[answer.rindex("</tool_call>") + len("</tool_call>") :]
    between = _CALL.sub("", answer[answer.index("<tool_call>") :])
    if after.strip() or between.strip():
        raise MalformedTextError("text after a <tool_call>")
    return [_call(_loads(body), body) for body in _CALL.findall(answer)]


def _json_calls(answer: str) -> list[Message] | None:
    """The calls of a reply that is nothing but JSON in a call's form; None if it is an ordinary answer."""
    stripped = answer.strip()
    if stripped[:1] not in ("{", "["):
        return None
    try:
        value = json.loads(stripped)
    except ValueError:
        return None
    if isinstance(value, Mapping) and set(value) <= {"tool_calls", "content", "role"}:
        value = value.get("tool_calls")
    values = value if isinstance(value, list) else [value]
    if not values or not all(_is_call(item) for item in values):
        return None
    return [_call(item, stripped if len(values) == 1 else "") for item in values]


def _is_call(value: Any) -> bool:
    if not isinstance(value, Mapping) or not set(value) <= _CALL_KEYS:
        return False
    function = value.get("function", value)
    return isinstance(function, Mapping) and "name" in function and bool({"arguments", "parameters"} & set(function))


def _loads(body: str) -> Any:
    try:
        return json.loads(body)
    except ValueError as error:
        raise MalformedTextError("a <tool_call> that is not JSON") from error


def _call(value: Any, source: str) -> Message:
    """One call. Its content is the arguments as they were written in `source`, where they can be found there."""
    if not _is_call(value):
        raise MalformedTextError("a call without name and arguments")
    function = value.get("function", value)
    name, arguments = function["name"], function.get("arguments", function.get("parameters"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise MalformedTextError("a call whose name is not one word")
    if isinstance(arguments, str):
        written = arguments
        arguments = _loads_arguments(arguments)
    else:
        written = _as_written(source, arguments)
    if not isinstance(arguments, dict):
        raise MalformedTextError("a call whose arguments are not a JSON object")
    try:
        written.encode()
    except UnicodeEncodeError as error:
        raise MalformedTextError("a call whose arguments hold half a character") from error
    recipient = name if "." in name else f"{FUNCTIONS}.{name}"
    return Message("assistant", written, recipient=recipient, content_type="json")


def _loads_arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _as_written(source: str, arguments: Any) -> str:
    for found in _ARGUMENTS.finditer(source):
        try:
            value, stop = _DECODER.raw_decode(source, found.end())
        except ValueError:
            continue
        if value == arguments:
            return source[found.end() : stop]
    return json.dumps(arguments, ensure_ascii=False)
