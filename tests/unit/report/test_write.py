"""The page as a parser of HTML reads it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from keel.report import write
from keel.report.data import report_data
from keel.report.write import MAX_BYTES, page, write_report
from tests.hostile import HOSTILE, MARK


class Page(HTMLParser):
    """Elements with their attributes, the texts of scripts, and the policy."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._script: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs) if tag == "script" else None
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self._script = None if tag == "script" else self._script

    def handle_data(self, data):
        if self._script is not None:
            attrs, text = self.scripts[-1]
            self.scripts[-1] = (attrs, text + data)

    @property
    def policy(self) -> str:
        return next(
            attrs["content"] for tag, attrs in self.elements if attrs.get("http-equiv") == "Content-Security-Policy"
        )

    @property
    def data(self):
        return json.loads(next(text for attrs, text in self.scripts if attrs.get("id") == "keel-data"))


@pytest.fixture(scope="module")
def hostile_page(named_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "hostile.html"
    assert write_report(named_run("hostile"), out) == out
    return Page(out.read_text(encoding="utf-8"))


def test_nothing_that_a_run_says_becomes_markup(hostile_page, named_run, tmp_path):
    harmless = Page(write_report(named_run("empty"), tmp_path / "empty.html").read_text(encoding="utf-8"))
    assert hostile_page.elements == harmless.elements
    assert len(hostile_page.scripts) == 3


def test_the_data_of_a_hostile_run_comes_back_whole(hostile_page, named_run):
    assert hostile_page.data["alarms"] == report_data(named_run("hostile"), budget_bytes=0)["alarms"]
    contents = {
        message["content"]
        for step in hostile_page.data["steps"].values()
        for group in step["groups"]
        for each in group["trajectories"]
        for message in each["messages"]
    }
    for name, text in HOSTILE.items():
        assert name == "huge" or any(text in content for content in contents), name


def test_only_our_two_scripts_may_run_and_nothing_may_be_loaded(hostile_page):
    hashes = {
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for attrs, text in hostile_page.scripts
        if attrs.get("type") != "application/json"
    }
    rules = dict(rule.strip().split(" ", 1) for rule in hostile_page.policy.split(";"))
    assert len(hashes) == 2
    assert set(rules.pop("script-src").split()) == hashes
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert not [
        tag for tag, attrs in hostile_page.elements if "src" in attrs or tag in ("link", "iframe", "base", "object")
    ]
    assert not [attrs for _, attrs in hostile_page.elements if any(name.startswith("on") for name in attrs)]
    assert MARK not in hostile_page.policy


def test_a_live_page_may_ask_its_own_server_and_no_other():
    assert "connect-src 'self'" in Page(page("template.html", "{}", live=True)).policy
    assert "connect-src" not in Page(page("template.html", "{}")).policy


@pytest.mark.parametrize("template", ["template.html", "compare.html"])
def test_every_place_of_a_template_is_filled(template):
    text = page(template, '{"a":1}')
    ours = Page(text)
    assert ours.data == {"a": 1}
    assert "{{" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert any("Plotly" in script for attrs, script in ours.scripts)
    assert "--" in text.split("<style>")[1].split("</style>")[0]


def test_the_page_of_a_thousand_steps_is_at_most_fifteen_megabytes(named_run, tmp_path):
    size = write_report(named_run("thousand"), tmp_path / "page.html").stat().st_size
    assert 13_000_000 < size <= MAX_BYTES == 15_000_000


def test_data_with_placeholders_is_not_filled_in():
    assert Page(page("template.html", '"{{csp}} {{data}} {{plotly}}"')).data == "{{csp}} {{data}} {{plotly}}"


def test_a_script_that_would_end_its_element_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "PAGE", tmp_path)
    (tmp_path / "bad.js").write_text("const end = '</SCRIPT>';")
    (tmp_path / "bad.html").write_text("<script>{{js bad.js}}</script>")
    with pytest.raises(ValueError, match="cannot stand inline"):
        page("bad.html", "{}")


def test_it_is_written_beside_the_run_and_replaces_the_old_one_whole(named_run, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_bytes((named_run("empty") / "config.toml").read_bytes())
    old = run / "report.html"
    old.write_text("old")
    reader = old.open()
    assert write_report(run) == old
    assert reader.read() == "old"  # who was reading goes on reading what was there
    assert old.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert {path.name for path in run.iterdir()} == {"config.toml", "report.html"}
