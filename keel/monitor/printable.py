"""Foreign text made safe for a terminal: whatever a model, a tool, a task or a file says stays text.

A terminal obeys what it is sent. An escape sequence recolours it, moves the cursor over what was printed before, sets
the window's title (OSC 0), hides a link under other words (OSC 8) or writes to the clipboard (OSC 52); bidi controls
show characters in another order than they are in; zero-width characters make two different names look the same. All
of them begin with, or are, characters that show nothing by themselves, and those are shown here as what they are.
"""

from __future__ import annotations

import unicodedata

_KEPT = frozenset("\n\t")
_SPACES = "Zs"
# Default_Ignorable_Code_Point of the Unicode Character Database (DerivedCoreProperties.txt), the part of it that
# `str.isprintable` lets through: fillers, joiners and variation selectors, which show nothing of their own.
_INVISIBLE = (
    (0x034F, 0x034F),
    (0x115F, 0x1160),
    (0x17B4, 0x17B5),
    (0x180B, 0x180F),
    (0x3164, 0x3164),
    (0xFE00, 0xFE0F),
    (0xFFA0, 0xFFA0),
    (0xE0100, 0xE01EF),
)


def printable(text: str, *, limit: int | None = None) -> str:
    """`text` with everything that shows nothing by itself as a visible escape (`\\x1b`, `\\u202e`); newline, tab and
    spaces stay.

    Control characters, bidi controls, zero-width characters and lone surrogates are such; the result can be written to
    any UTF-8 stream. With `limit`, at most so many characters of `text` are shown, and how many are not is said.
    """
    cut = "" if limit is None or len(text) <= limit else f" [{len(text) - limit:,} more characters]"
    shown = text if limit is None else text[:limit]
    return (shown if shown.isascii() and shown.isprintable() else shown.translate(_escapes)) + cut


def one_line(text: str, *, limit: int | None = None) -> str:
    """`printable` without line breaks: text that must not be able to look like a line of its own."""
    return printable(text, limit=limit).replace("\n", "\\n").replace("\t", "\\t")


def _escape(char: str) -> str:
    code = ord(char)
    seen = char in _KEPT or char.isprintable() or unicodedata.category(char) == _SPACES
    if seen and not any(low <= code <= high for low, high in _INVISIBLE):
        return char
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


class _Escapes(dict[int, str]):
    """A table for `str.translate` that is filled as characters are met: megabytes of text cost little."""

    def __missing__(self, code: int) -> str:
        self[code] = escaped = _escape(chr(code))
        return escaped


_escapes = _Escapes()
