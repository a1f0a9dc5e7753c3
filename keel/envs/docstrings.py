"""What a docstring says of a function and of its arguments: Google style ("Args:") and reST (":param x:")."""

from __future__ import annotations

import re

_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns?|Yields?|Raises|Examples?|Notes?):\s*$")
_ARGUMENT_SECTIONS = {"Args", "Arguments", "Parameters"}
_GOOGLE_ARGUMENT = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
_REST_ARGUMENT = re.compile(r"^:param\s+(?:[^:]*\s)?(\w+)\s*:\s*(.*)$")


def parse_docstring(docstring: str) -> tuple[str, dict[str, str]]:
    """The description (all before the first section), and what is said of each argument.

    `docstring` is dedented, as `inspect.getdoc` gives it. Paragraph breaks of the description stay, its line breaks
    do not.
    """
    lines = docstring.strip().splitlines()
    end = next((i for i, line in enumerate(lines) if _SECTION.match(line) or line.startswith(":")), len(lines))
    paragraphs = "\n".join(lines[:end]).strip().split("\n\n")
    description = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return description, {**_google_arguments(lines[end:]), **_rest_arguments(lines[end:])}


def _google_arguments(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    name: str | None = None
    inside = False
    indent: int | None = None
    for line in lines:
        section = _SECTION.match(line)
        if section:
            inside, name, indent = section[1] in _ARGUMENT_SECTIONS, None, None
            continue
        if not inside or not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        indent = depth if indent is None else indent
        argument = _GOOGLE_ARGUMENT.match(line.strip()) if depth <= indent else None
        if argument:
            name = argument[1]
            found[name] = argument[2].strip()
        elif name is not None:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _rest_arguments(lines: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    name: str | None = None
    for line in lines:
        argument = _REST_ARGUMENT.match(line.strip())
        if argument:
            name = argument[1]
            found[name] = argument[2].strip()
        elif line.lstrip().startswith(":") or not line.strip():
            name = None
        elif name is not None:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found
