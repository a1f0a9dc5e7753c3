"""Schemas from signatures, and every way a call can go wrong, which is always an answer for the agent."""

from __future__ import annotations

import asyncio
import enum
import json
import threading
from typing import Annotated, Any, Literal, Optional

import pydantic
import pytest

from keel.envs.base import EnvError
from keel.envs.docstrings import parse_docstring
from keel.envs.tools import ToolDeclarationError, ToolResult, as_tools, call_tool, tool


class Unit(enum.Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


class Place(pydantic.BaseModel):
    city: str = pydantic.Field(description="Its name.")
    height_m: float = 0.0


class Node(pydantic.BaseModel):
    children: list[Node] = []


def weather(
    place: Place,
    days: int,
    unit: Unit = Unit.CELSIUS,
    mode: Literal["fast", "exact"] = "fast",
    tags: list[str] | None = None,
    limits: dict[str, float] = {},  # noqa: B006
    json: Optional[bool] = None,  # noqa: UP045
) -> str:
    """Tell the weather.

    It is made up,
    every time.

    Args:
        place: Where.
        days: How many days,
            counted from today.
        tags (list): Words.

    Returns:
        A sentence.
    """
    return f"{place.city} {place.height_m} {days} {unit.value} {mode} {tags} {limits} {json}"


def call(made: Any, arguments: str) -> ToolResult:
    return asyncio.run(made.call(arguments))


def test_the_schema_says_what_the_signature_says() -> None:
    spec = tool(weather).spec
    assert spec.name == "weather"
    assert spec.description == "Tell the weather.\n\nIt is made up, every time."
    place = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Its name."},
            "height_m": {"type": "number", "default": 0.0},
        },
        "required": ["city"],
        "description": "Where.",
    }
    assert spec.parameters == {
        "type": "object",
        "properties": {
            "place": place,
            "days": {"type": "integer", "description": "How many days, counted from today."},
            "unit": {"type": "string", "enum": ["celsius", "kelvin"], "default": "celsius"},
            "mode": {"type": "string", "enum": ["fast", "exact"], "default": "fast"},
            "tags": {
                "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
                "default": None,
                "description": "Words.",
            },
            "limits": {"type": "object", "additionalProperties": {"type": "number"}, "default": {}},
            "json": {"anyOf": [{"type": "boolean"}, {"type": "null"}], "default": None},
        },
        "required": ["place", "days"],
        "additionalProperties": False,
    }
    assert json.loads(json.dumps(spec.parameters)) == spec.parameters


def test_arguments_arrive_as_the_types_of_the_signature() -> None:
    arguments = '{"place": {"city": "Bern"}, "days": 2, "unit": "kelvin", "tags": ["a"], "json": true}'
    result = call(tool(weather), arguments)
    assert result == ToolResult("Bern 0.0 2 kelvin fast ['a'] {} True")


@pytest.mark.parametrize(
    ("arguments", "kind", "mentions"),
    [
        ("{", "bad_json", "not a JSON object"),
        ("3 + 4", "bad_json", "not a JSON object"),
        ("[]", "bad_arguments", "arguments"),
        ("null", "bad_arguments", "arguments"),
        ('{"days": 1}', "bad_arguments", "place"),
        ('{"place": {"city": "x"}, "days": "many"}', "bad_arguments", "days"),
        ('{"place": {"city": 3}, "days": 1}', "bad_arguments", "place.city"),
        ('{"place": {"city": "x"}, "days": 1, "hours": 2}', "bad_arguments", "hours"),
        ('{"place": {"city": "x"}, "days": 1, "mode": "slow"}', "bad_arguments", "mode"),
        ("\ud800", "bad_arguments", "arguments"),
    ],
)
def test_wrong_arguments_are_answered(arguments: str, kind: str, mentions: str) -> None:
    result = call(tool(weather), arguments)
    assert result.error == kind
    assert result.text.startswith("Error:")
    assert mentions in result.text


def test_an_unknown_tool_is_answered_with_the_known_ones() -> None:
    result = asyncio.run(call_tool(as_tools([weather]), "functions.wether", "{}"))
    assert result == ToolResult(
        "Error: there is no tool 'functions.wether'; known tools: functions.weather.", "unknown_tool"
    )


def test_what_a_tool_raises_is_answered_but_a_failure_of_the_world_passes_through() -> None:
    def broken(kind: str) -> str:
        """Break."""
        raise {"world": EnvError, "tool": ValueError}[kind]("no such thing")

    assert call(tool(broken), '{"kind": "tool"}') == ToolResult("Error: broken failed: no such thing", "raised")
    with pytest.raises(EnvError):
        call(tool(broken), '{"kind": "world"}')


def test_a_tool_that_hangs_is_answered() -> None:
    release = threading.Event()

    def plain() -> str:
        """Hang."""
        release.wait()
        return ""

    async def asynchronous() -> str:
        """Hang."""
        await asyncio.Event().wait()
        return ""

    for function in (plain, asynchronous):
        result = call(tool(function, timeout_s=0.05), "{}")
        assert result == ToolResult(f"Error: {function.__name__} did not answer within 0.05 s.", "timeout")
    release.set()


def test_async_tools_methods_and_results_of_other_types() -> None:
    class Shop:
        price = 3

        async def buy(self, count: int) -> dict[str, Any]:
            """Buy."""
            return {"paid": self.price * count, "place": None}

        def where(self) -> Place:
            """Say where."""
            return Place(city="Ulm")

    assert call(tool(Shop().buy), '{"count": 2}').text == '{"paid": 6, "place": null}'
    assert call(tool(Shop().where), "").text == '{"city":"Ulm","height_m":0.0}'


def test_a_long_output_is_cut_and_says_so() -> None:
    def long() -> str:
        """Talk."""
        return "x" * 30

    assert call(tool(long, max_output_chars=10), "{}").text == "x" * 10 + "\n[cut: 10 of 30 characters shown]"


def test_constraints_of_annotated_types_hold() -> None:
    def pick(number: Annotated[int, pydantic.Field(ge=1, le=6)]) -> int:
        """Pick."""
        return number

    assert tool(pick).spec.parameters["properties"]["number"] == {"type": "integer", "minimum": 1, "maximum": 6}
    assert call(tool(pick), '{"number": 7}').error == "bad_arguments"
    assert call(tool(pick), '{"number": 6}').text == "6"


def test_raw_code_reaches_a_tool_called_python() -> None:
    def python(code: str) -> str:
        """Run code."""
        return code.upper()

    assert asyncio.run(call_tool(as_tools([python]), "python", 'print("a")\n')).text == 'PRINT("A")\n'
    with pytest.raises(ToolDeclarationError, match="one parameter"):
        tool(weather, name="python")


def no_docstring(text: str) -> str:
    return text


def no_type(text) -> str:  # type: ignore[no-untyped-def]
    """Say."""
    return str(text)


def variadic(*texts: str) -> str:
    """Say."""
    return " ".join(texts)


def drifted(text: str) -> str:
    """Say.

    Args:
        words: What to say.
    """
    return text


def endless(node: Node) -> str:
    """Say."""
    return str(node)


def unserializable(event: threading.Event) -> str:
    """Say."""
    return str(event)


@pytest.mark.parametrize(
    ("function", "mentions"),
    [
        (no_docstring, "no docstring"),
        (no_type, "has no type"),
        (variadic, "by name"),
        (drifted, "words"),
        (endless, "contains itself"),
        (unserializable, "JSON schema"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_refused(function: Any, mentions: str) -> None:
    with pytest.raises(ToolDeclarationError, match=mentions):
        tool(function)


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(ToolDeclarationError, match="two tools"):
        as_tools([weather, tool(weather)])


def test_docstrings_in_rest_style() -> None:
    text = "Say it.\n\n:param str first: One\n    and more.\n:param second: Two.\n:returns: nothing"
    assert parse_docstring(text) == ("Say it.", {"first": "One and more.", "second": "Two."})
