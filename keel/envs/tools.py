"""Tools: typed Python functions with a docstring, shown to the agent as a JSON schema and called with JSON.

    def weather(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> str:
        \"\"\"Tell the weather.

        Args:
            city: Where, for example "Bern".
        \"\"\"

    tool(weather).spec                          # name, description, JSON schema
    await tool(weather).call('{"city": "Bern"}')  # ToolResult(text=..., error=None)

Whatever the agent gets wrong (bad JSON, wrong types, an unknown tool), and whatever the tool itself raises, becomes a
text for the agent that starts with "Error:". Only `EnvError` passes through: it says that the world, not the
agent, failed.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic

from keel.envs.base import EnvError
from keel.envs.calls import call_with_timeout
from keel.envs.docstrings import parse_docstring
from keel.envs.threads import CallTimeoutError, HangingCallsError
from keel.types import ToolSpec, UserFault

ToolErrorKind = Literal["unknown_tool", "bad_json", "bad_arguments", "raised", "timeout"]


PYTHON = "python"
"""Name of the tool that GPT-OSS calls with raw code; a function of this name has one parameter, the code."""


class ToolDeclarationError(UserFault, TypeError):
    """A function cannot be a tool; says what is missing and how to add it."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What the agent reads; `error` is None, or the kind of thing that went wrong."""

    text: str
    error: ToolErrorKind | None = None


class Tool:
    """A function the agent may call. Made by `tool`."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        timeout_s: float = 30.0,
        max_output_chars: int = 10_000,
        quick: bool = False,
    ) -> None:
        self.function = function
        self.timeout_s = timeout_s
        self.max_output_chars = max_output_chars
        self.quick = quick
        shown = name or str(getattr(function, "__name__", type(function).__name__))
        self._arguments, description = _arguments_model(function, shown)
        if shown == PYTHON and len(self._arguments.model_fields) != 1:
            raise ToolDeclarationError(f"tool {PYTHON} is called with raw code alone; give it one parameter, the code")
        self.spec = ToolSpec(shown, description, _schema(self._arguments, shown))

    @property
    def name(self) -> str:
        return self.spec.name

    async def call(self, arguments_json: str) -> ToolResult:
        """Call the function with arguments given as a JSON object; never raises for the agent's or tool's faults.

        Raises EnvError if the function does, and HangingCallsError.
        """
        try:
            arguments = self._arguments.model_validate_json(arguments_json.strip() or "{}")
        except pydantic.ValidationError as error:
            return self._refused(error)
        values = {field.alias or name: getattr(arguments, name) for name, field in self._arguments.model_fields.items()}
        try:
            if self.quick:
                result = self.function(**values)
            else:
                result = await call_with_timeout(_Bound(self.function, values).target, timeout_s=self.timeout_s)
        except (EnvError, HangingCallsError):
            raise
        except CallTimeoutError:
            return ToolResult(f"Error: {self.name} did not answer within {self.timeout_s:g} s.", "timeout")
        except Exception as error:  # noqa: BLE001 (user code: the agent is told)
            detail = str(error) or type(error).__name__
            return ToolResult(self._cut(f"Error: {self.name} failed: {detail}"), "raised")
        return ToolResult(self._cut(_as_text(result)))

    def _refused(self, error: pydantic.ValidationError) -> ToolResult:
        faults = error.errors(include_url=False, include_context=False)
        if faults[0]["type"] == "json_invalid":
            return ToolResult(self._cut(f"Error: the arguments of {self.name} are not a JSON object."), "bad_json")
        said = "; ".join(f"{'.'.join(map(str, fault['loc'])) or 'arguments'}: {fault['msg']}" for fault in faults)
        return ToolResult(self._cut(f"Error: wrong arguments for {self.name}: {said}."), "bad_arguments")

    def _cut(self, text: str) -> str:
        if len(text) <= self.max_output_chars:
            return text
        return f"{text[: self.max_output_chars]}\n[cut: {self.max_output_chars} of {len(text)} characters shown]"


class _Bound:
    """A function with its arguments, plain or async as the function is."""

    def __init__(self, function: Callable[..., Any], values: Mapping[str, Any]) -> None:
        self._function = function
        self._values = values
        asynchronous = inspect.iscoroutinefunction(function)
        self.target: Callable[[], Any] = self._call_async if asynchronous else self._call

    def _call(self) -> Any:
        return self._function(**self._values)

    async def _call_async(self) -> Any:
        return await self._function(**self._values)


def tool(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    timeout_s: float = 30.0,
    max_output_chars: int = 10_000,
    quick: bool = False,
) -> Tool:
    """A tool from a typed function with a docstring; its schema comes from annotations, defaults and docstring.

    `timeout_s` seconds per call; a longer output than `max_output_chars` is cut, visibly. `quick` runs a plain function
    on the event loop itself, without a thread and without a time-out: for work of microseconds that cannot hang.
    Raises ToolDeclarationError if a parameter has no type, if there is no docstring, or if the docstring describes an
    argument that does not exist.
    """
    if quick and inspect.iscoroutinefunction(function):
        raise ToolDeclarationError(f"tool {function.__name__}: quick is for plain functions; got an async one")
    return Tool(function, name=name, timeout_s=timeout_s, max_output_chars=max_output_chars, quick=quick)


def as_tools(tools: Sequence[Tool | Callable[..., Any]]) -> dict[str, Tool]:
    """Tools by name, functions made into tools. Raises ToolDeclarationError if two have the same name."""
    found: dict[str, Tool] = {}
    for item in tools:
        made = item if isinstance(item, Tool) else tool(item)
        if made.name in found:
            raise ToolDeclarationError(f"two tools are named {made.name!r}; give one another name: tool(f, name=...)")
        found[made.name] = made
    return found


async def call_tool(tools: Mapping[str, Tool], recipient: str, content: str) -> ToolResult:
    """Call the tool addressed by `recipient` ("functions.calculator" or "calculator") with a message's content.

    The content is JSON, but for Harmony's built-in tool `python`, which is given raw code.
    """
    found = tools.get(recipient.removeprefix("functions."))
    if found is None:
        known = ", ".join(f"functions.{name}" for name in tools) or "none"
        return ToolResult(f"Error: there is no tool {recipient[:100]!r}; known tools: {known}.", "unknown_tool")
    if recipient == PYTHON:
        content = json.dumps({next(iter(found.spec.parameters["properties"]), "code"): content})
    return await found.call(content)


def _arguments_model(function: Callable[..., Any], name: str) -> tuple[type[pydantic.BaseModel], str]:
    """A pydantic model of the function's arguments, and the description of the tool."""
    docstring = inspect.getdoc(function)
    if not docstring:
        raise ToolDeclarationError(f"tool {name} has no docstring; the agent needs one line on what it does")
    description, described = parse_docstring(docstring)
    hints = _type_hints(function, name)
    fields: dict[str, Any] = {}
    for index, parameter in enumerate(inspect.signature(function).parameters.values()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ToolDeclarationError(f"tool {name}: {parameter} cannot be given by name; use ordinary parameters")
        if parameter.name not in hints:
            raise ToolDeclarationError(f"tool {name}: parameter {parameter.name!r} has no type; add one, like ': str'")
        default = ... if parameter.default is parameter.empty else parameter.default
        options: dict[str, Any] = {"alias": parameter.name}
        if parameter.name in described:
            options["description"] = described.pop(parameter.name)
        # Fields get neutral names: an argument may be called "json" or "copy", which a pydantic model reserves.
        fields[f"argument_{index}"] = (Annotated[hints[parameter.name], pydantic.Field(**options)], default)
    if described:
        raise ToolDeclarationError(f"tool {name}: its docstring describes {', '.join(described)}, not a parameter")
    config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=False)
    try:
        return pydantic.create_model(f"{name}_arguments", __config__=config, **fields), description
    except pydantic.errors.PydanticUserError as error:
        raise ToolDeclarationError(f"tool {name}: a parameter's type has no JSON schema: {error}") from error


def _type_hints(function: Callable[..., Any], name: str) -> dict[str, Any]:
    target = function if inspect.isroutine(function) else type(function).__call__
    try:
        return typing.get_type_hints(target, include_extras=True)
    except NameError as error:
        raise ToolDeclarationError(f"tool {name}: {error} in its annotations; define or import it globally") from error


def _schema(model: type[pydantic.BaseModel], name: str) -> dict[str, Any]:
    try:
        schema = model.model_json_schema()
    except pydantic.errors.PydanticInvalidForJsonSchema as error:
        raise ToolDeclarationError(f"tool {name}: a parameter's type has no JSON schema: {error}") from error
    definitions = schema.pop("$defs", {})
    return {"type": "object", "properties": {}, **_plain(schema, definitions, (), name)}


def _plain(schema: Any, definitions: Mapping[str, Any], inside: tuple[str, ...], name: str) -> Any:
    """The schema with references put in place and generated titles left out: chat formats render it as it stands."""
    if isinstance(schema, list):
        return [_plain(part, definitions, inside, name) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        key = schema["$ref"].rsplit("/", 1)[-1]
        if key in inside:
            raise ToolDeclarationError(f"tool {name}: type {key} contains itself; an agent needs a finite schema")
        rest = {other: value for other, value in schema.items() if other != "$ref"}
        return {**_plain(definitions[key], definitions, (*inside, key), name), **rest}
    plain: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            plain[key] = {field: _plain(part, definitions, inside, name) for field, part in value.items()}
        elif key in ("default", "const", "enum", "examples"):
            plain[key] = value
        elif key != "title":
            plain[key] = _plain(value, definitions, inside, name)
    return plain


def _as_text(result: Any) -> str:
    if isinstance(result, str):
        return result
    if isinstance(result, pydantic.BaseModel):
        return result.model_dump_json()
    return json.dumps(result, default=str, ensure_ascii=False)
