"""Foreign text on a terminal is text: nothing that acts, hides or reorders is left in it."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from keel.monitor.printable import one_line, printable
from tests.hostile import HOSTILE

ACTS = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Categories of the Unicode database whose characters show nothing of their own."""


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_that_acts_is_left_and_nothing_is_lost(name):
    text = HOSTILE[name]
    shown = printable(text)
    assert not [char for char in set(shown) - set("\n\t") if unicodedata.category(char) in ACTS]
    shown.encode("utf-8")
    seen = set(shown)
    # An escape stands for exactly one character: undone, the text is what it was.
    assert shown.encode("ascii", "backslashreplace") == "".join(
        char if char in seen else _escaped(char) for char in text
    ).encode("ascii", "backslashreplace")
    assert "\n" not in one_line(text)


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


@given(st.text(st.characters(), max_size=60))
def test_any_text_can_be_written_and_shown_twice(text):
    shown = printable(text)
    shown.encode("utf-8")
    assert printable(shown) == shown
    assert Text(one_line(text)).plain == one_line(text)  # rich strips control codes; none is left to strip


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, été 日本 \u3000\xa0 שלום 🙂", "plain, été 日本 \u3000\xa0 שלום 🙂"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m\r\x07\x00\x7f", "\\x9b31m\\x0d\\x07\\x00\\x7f"),
        ("x\u202ey\u2066z", "x\\u202ey\\u2066z"),
        ("a\u200bb\ufeffc\xadd", "a\\u200bb\\ufeffc\\xadd"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        ("\u3164\u115f\ufe0f\U000e0100", "\\u3164\\u115f\\ufe0f\\U000e0100"),
        ("one\u2028two", "one\\u2028two"),
    ],
)
def test_what_is_seen_stays_and_what_is_not_is_spelled(text, shown):
    assert printable(text) == shown


def test_a_cut_is_said():
    assert printable("x" * 10, limit=10) == "x" * 10
    assert printable("\x1b" * 12_345, limit=2) == "\\x1b\\x1b [12,343 more characters]"
    assert one_line("a\nb\tc", limit=3) == "a\\nb [2 more characters]"
