"""Values of a run made fit for a page: finite numbers, text of bounded length, no secrets, and JSON that no parser of
HTML can mistake for markup.

What a run says (its tasks, its model's text, its tools' answers, its file names) is foreign. It is kept as it is where
it can be, and where it is cut or hidden the text itself says so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from keel.secrecy import scrubbed

MAX_TEXT = 20_000
"""Characters of one text that a page shows; what is longer is cut in the middle, and says so."""
HIDDEN = "[hidden: looks like a secret]"

_SECRET_NAME = re.compile(
    r"(?:^|[_\-.])(?:(?:api|access|secret|private|auth)_?key|secret|passw(?:or)?d|passphrase|credentials?|bearer"
    r"|(?:api|auth|access|bearer|refresh|hf|hub|github|session|bot)_?token)$|^token$",
    re.IGNORECASE,
)
# `name = "value"`, as a line of TOML or within an inline table.
_ASSIGNED = re.compile(r"""(?P<name>[A-Za-z0-9_.\-]+)"?(?P<sign>\s*=\s*)(?P<value>"(?:[^"\\\n]|\\.)*"|'[^'\n]*')""")


def cut(text: str, limit: int = MAX_TEXT) -> str:
    """`text`, or its beginning and end around a statement of how much is missing."""
    if len(text) <= limit:
        return text
    head, tail = limit * 3 // 4, limit // 4
    return f"{text[:head]}\n[... {len(text) - head - tail:,} characters left out of this page ...]\n{text[-tail:]}"


def without_secrets(text: str) -> str:
    """`text` without what looks like a key, token or password: by its form, its value, or its option's name.

    A run directory of Keel's own holds none (`keel.secrecy`); one made by hand or by others may.
    """

    def assigned(match: re.Match[str]) -> str:
        named_so = _SECRET_NAME.search(match["name"]) and len(match["value"]) > 2
        return f'{match["name"]}{match["sign"]}"{HIDDEN}"' if named_so else match[0]

    return scrubbed(_ASSIGNED.sub(assigned, text))


def number(value: Any, digits: int = 6) -> int | float | None:
    """A finite number with `digits` significant digits, an integer where it is one; None for anything else."""
    if type(value) is not float:  # most are, and a page has hundreds of thousands
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return int(value) if is_whole and _is_finite(value) else None
    if not math.isfinite(value):
        return None
    rounded = float(format(value, f".{digits}g"))
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def plain(value: Any) -> Any:
    """Any value of a run as JSON: texts cut, numbers that are not finite null, keys as text."""
    if isinstance(value, str):
        return cut(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return value if _is_finite(value) else None
    if isinstance(value, Mapping):
        return {cut(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return cut(str(value))


def to_json(value: Any) -> str:
    """`value` as ASCII JSON without `<`, `>` and `&`: safe as the text of a script element, whatever it holds.

    Everything that is not ASCII is escaped, so line separators, halves of surrogate pairs and bidirectional marks are
    characters of a string and nothing else. Raises ValueError for a number that is not finite.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False
