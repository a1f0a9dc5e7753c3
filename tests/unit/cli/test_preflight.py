"""What `keel preflight` prints: all that was found, and nothing that text from elsewhere could make of it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from keel.cli.preflight import print_result
from keel.preflights.result import Attribution, Check, PreflightResult

HOSTILE = "[bold]x[/bold] \x1b[31mred\nfail  a line of its own"


def printed(result: PreflightResult) -> str:
    out = io.StringIO()
    print_result(result, Console(file=out, highlight=False, width=200))
    return out.getvalue()


def result_with(*checks: Check, attribution: tuple[Attribution, ...] = ()) -> PreflightResult:
    gap = {"abs_mean": 0.25, "tokens": 40.0}
    return PreflightResult({"model": HOSTILE}, checks, attribution, gap=gap, noise=1e-6, duration_s=3.0)


def test_every_check_is_shown_with_figure_threshold_reason_and_fix():
    told = printed(result_with(Check("gap", "they agree", "fail", "they do not", 0.25, 3e-6, "nats", "mend it")))
    row = next(line for line in told.splitlines() if "they agree" in line)
    assert row.split() == ["fail", "they", "agree", "0.25", "nats", "3e-06", "they", "do", "not"]
    assert "what to do: mend it" in told
    assert "Not fit for on-policy training" in told
    assert "abs_mean 0.25" in told
    assert "40 tokens" in told


def test_causes_are_shown_with_side_share_and_what_to_do():
    cause = Attribution("sinks_dropped", "engine", 0.9, 0.1, 0.01, layer=3, text="the sinks are gone")
    told = printed(result_with(Check("gap", "t", "fail", "r"), attribution=(cause,)))
    row = next(line for line in told.splitlines() if "layer 3" in line)
    assert "engine" in row
    assert "90%" in row
    assert "the sinks are gone" in row


@pytest.mark.parametrize("where", ["reason", "fix", "title"])
def test_text_from_elsewhere_is_neither_markup_nor_an_escape_nor_a_line(where):
    texts = {"reason": "r", "fix": "f", "title": "t", where: HOSTILE}
    told = printed(result_with(Check("gap", texts["title"], "fail", texts["reason"], fix=texts["fix"])))
    assert "[bold]x" in told.replace("\n", "")
    assert "\x1b" not in told
    assert not any(line.startswith("fail  a line") for line in told.splitlines())


@pytest.mark.parametrize(
    ("status", "words"), [("pass", "pass: Fit for"), ("warn", "warn: Fit with reservations"), ("skip", "pass: Fit for")]
)
def test_the_verdict_is_the_last_line(status, words):
    assert words in printed(result_with(Check("gap", "t", status, "r"))).rstrip().splitlines()[-1]
