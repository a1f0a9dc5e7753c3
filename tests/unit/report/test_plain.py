from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel.report.plain import HIDDEN, MAX_TEXT, cut, number, plain, to_json, without_secrets
from tests.hostile import HOSTILE

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


class ScriptText(HTMLParser):
    """What a parser of HTML takes for the text of script elements, and every other element it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.elements: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.elements.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def read_back(text: str) -> object:
    page = ScriptText()
    page.feed(f'<script type="application/json">{text}</script>')
    assert page.elements == ["script"]
    return json.loads("".join(page.texts))


@given(JSON_VALUES)
def test_any_value_survives_being_the_text_of_a_script_element(value):
    assert read_back(to_json(value)) == value


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "huge"])
def test_a_hostile_text_comes_back_as_it_was_as_value_and_as_key(name):
    text = HOSTILE[name]
    written = to_json({"text": text, text: 1})
    assert read_back(written)["text"] == text
    assert written.isascii()
    assert not set("<>&") & set(written)


def test_a_number_that_is_none_is_refused_rather_than_written_as_something_else():
    with pytest.raises(ValueError, match="JSON"):
        to_json([float("nan")])
    assert plain({"a": float("nan"), "b": [float("inf"), 1.5]}) == {"a": None, "b": [None, 1.5]}


def test_a_long_text_is_cut_in_the_middle_and_says_so():
    text = "a" * MAX_TEXT + "end"
    shown = cut(text)
    assert shown.startswith("aaa")
    assert shown.endswith("end")
    assert "[... 3 characters left out of this page ...]" in shown
    assert cut("a" * MAX_TEXT) == "a" * MAX_TEXT
    assert len(cut(HOSTILE["huge"])) < MAX_TEXT + 100


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, 0),
        (1.0, 1),
        (0.1234567, 0.123457),
        (1e-7, 1e-7),
        (7, 7),
        (float("nan"), None),
        (float("-inf"), None),
        (True, None),
        ("1", None),
        (None, None),
        (10**400, None),
    ],
)
def test_numbers_are_finite_and_short(value, shown):
    assert number(value) == shown


def test_keys_and_passwords_are_hidden_and_other_options_are_not():
    key = "sk-" + "a1B2" * 8
    config = "\n".join(
        [
            "seed = 3  # seed of everything",
            'eos_token = "<|end|>"',
            "max_tokens = 8192",
            f'note = "{key}"',
            'options = { api_key = "abcdefgh12", "hf_token" = "zzz" }',
            'password = "hunter22"',
        ]
    )
    shown = without_secrets(config)
    for secret in (key, "abcdefgh12", "zzz", "hunter22"):
        assert secret not in shown
    assert shown.count(HIDDEN) == 3
    for kept in ("seed = 3  # seed of everything", 'eos_token = "<|end|>"', "max_tokens = 8192"):
        assert kept in shown
