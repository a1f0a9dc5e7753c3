"""Tools as the TypeScript-like declarations of Harmony's `# Tools` sections, from their JSON schemas.

The published renderer (openai-harmony) is followed to the character, for that is what GPT-OSS was shown. The chat
template shipped with the weights puts one more comma behind the comment of a default, and differs where schemas nest:
nested objects without comments, `any[]` for long element types, no titles or examples. For flat schemas the two agree
but for that comma. In one case guide and template speak against the renderer and are followed: a function without
arguments is `() => any` even if its schema is an object without properties. A kind of schema that none of them knows
(`anyOf`, `$ref`, `null`) is `any`.

Example:

    // Adds two numbers.
    type add = (_: {
    // First summand
    a: number,
    b?: number, // default: 0
    }) => any;
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keel.types import ToolSpec

Schema = Mapping[str, Any]
FUNCTIONS = "functions"
_SCALARS = {"number": "number", "integer": "number", "boolean": "boolean"}


def namespace_of(tool_name: str) -> tuple[str, str]:
    """(namespace, bare name) of a tool: `functions` unless the name carries its own, as in `browser.search`."""
    namespace, dot, bare = tool_name.rpartition(".")
    return (namespace, bare) if dot else (FUNCTIONS, tool_name)


def tools_section(tools: Sequence[ToolSpec]) -> str:
    """The `# Tools` section of a developer message, one namespace after another in order of their names."""
    namespaces: dict[str, list[str]] = {}
    for tool in tools:
        namespace, bare = namespace_of(tool.name)
        namespaces.setdefault(namespace, []).append(_declaration(bare, tool))
    sections = [
        f"## {name}\n\nnamespace {name} {{\n\n" + "".join(namespaces[name]) + f"}} // namespace {name}"
        for name in sorted(namespaces)
    ]
    return "\n\n".join(["# Tools", *sections])


def _declaration(name: str, tool: ToolSpec) -> str:
    comment = "".join(f"// {line}\n" for line in tool.description.splitlines())
    takes_arguments = bool(tool.parameters.get("properties"))
    argument = f"_: {_type(tool.parameters, '')}" if takes_arguments else ""
    return f"{comment}type {name} = ({argument}) => any;\n\n"


def _type(schema: Any, indent: str) -> str:
    """The type a schema describes; lines after the first begin with `indent`."""
    if not isinstance(schema, Mapping):
        return "any"
    if isinstance(schema.get("oneOf"), Sequence):
        return "".join(
            f"\n{indent} | {_nullable(variant, indent + '   ')}{_trailing(variant, quote_enum=True)}"
            for variant in schema["oneOf"]
        )
    kind = schema.get("type")
    if isinstance(kind, Sequence) and not isinstance(kind, str):
        names = ["number" if name == "integer" else name for name in kind if isinstance(name, str)]
        return " | ".join(names) if names else "any"
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return f"{_type(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    if kind == "string":
        return " | ".join(f'"{value}"' for value in _strings(schema.get("enum"))) or "string"
    return _SCALARS.get(str(kind), "any")


def _nullable(schema: Any, indent: str) -> str:
    written = _type(schema, indent)
    nullable = isinstance(schema, Mapping) and schema.get("nullable") is True and "null" not in written
    return f"{written} | null" if nullable else written


def _object(schema: Schema, indent: str) -> str:
    description = schema.get("description")
    lines = [f"{indent}// {description}\n"] if isinstance(description, str) else []
    lines.append("{\n")
    required = set(_strings(schema.get("required")))
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        for name, value in properties.items():
            lines += _property(name if name in required else f"{name}?", value, indent)
    lines.append(f"{indent}}}")
    return "".join(lines)


def _property(label: str, schema: Any, indent: str) -> Iterable[str]:
    if not isinstance(schema, Mapping):
        return [f"{indent}{label}: any,\n"]
    lines = []
    title, description = schema.get("title"), schema.get("description")
    variants = schema.get("oneOf")
    has_variants = isinstance(variants, Sequence) and not isinstance(variants, str)
    if isinstance(title, str):
        lines.append(f"{indent}// {title}\n{indent}//\n")
    if isinstance(description, str) and not has_variants:
        lines.append(f"{indent}// {description}\n")
    examples = schema.get("examples")
    if isinstance(examples, Sequence) and examples and not isinstance(examples, str):
        lines.append(f"{indent}// Examples:\n")
        lines += [f'{indent}// - "{example}"\n' for example in _strings(examples)]
    if has_variants:
        return [*lines, *_variants(label, schema, indent)]
    default = f" // {_default(schema)}" if "default" in schema else ""
    return [*lines, f"{indent}{label}: {_nullable(schema, indent + '    ')},{default}\n"]


def _variants(label: str, schema: Schema, indent: str) -> Iterable[str]:
    """A property that is one of several types, each on its own line. The first variant's comment moves above the
    property if the property has its own and they differ; equal ones are written nowhere."""
    variants, description = schema["oneOf"], schema.get("description")
    first = variants[0].get("description") if variants and isinstance(variants[0], Mapping) else None
    above = isinstance(description, str) and description != first
    if above:
        yield f"{indent}// {description}\n"
    if "default" in schema:
        yield f"{indent}// {_default(schema)}\n"
    yield f"{indent}{label}:\n"
    for position, variant in enumerate(variants):
        hidden = description if not (above and position == 0) else first
        yield f"{indent} | {_nullable(variant, indent + '   ')}{_trailing(variant, hidden=hidden)}\n"
    yield f"{indent},\n"


def _trailing(schema: Any, *, hidden: Any = None, quote_enum: bool = False) -> str:
    if not isinstance(schema, Mapping):
        return ""
    description = schema.get("description")
    comments = [description] if isinstance(description, str) and description != hidden else []
    if "default" in schema:
        comments.append(_default(schema, quote_enum=quote_enum))
    return f" // {' '.join(comments)}" if comments else ""


def _default(schema: Schema, *, quote_enum: bool = False) -> str:
    """`default: value` as JSON, but bare for a string out of an enumeration (except in a free-standing `oneOf`)."""
    value = schema["default"]
    if isinstance(value, str) and schema.get("enum") and not quote_enum:
        return f"default: {value}"
    if isinstance(value, str):
        return f'default: "{value}"'
    return f"default: {json.dumps(value, separators=(',', ':'), ensure_ascii=False)}"


def _strings(values: Any) -> list[str]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        return []
    return [value for value in values if isinstance(value, str)]
