"""What is shown: the numbers that matter, time left, and never anybody's markup."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from keel.monitor import live

METRICS = {
    "reward/mean": 0.5,
    "success": 0.25,
    "policy/ratio_max_dev": 0.0,
    "policy/grad_norm": 1.25,
    "rollout/tokens_per_s": 12345.6,
    "unshown": 1.0,
}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_lines_come_at_the_first_and_last_step_and_now_and_then_between():
    out, clock = io.StringIO(), Clock()
    display = live.LineDisplay(out, clock)
    display.begin("reinforcement", 40)
    for step in range(40):
        clock.now += 1.0
        display.step("reinforcement", step, METRICS)
    lines = out.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 11, 21, 31, 40]
    assert lines[0].endswith("39 s left")
    assert "left" not in lines[-1]
    assert "reward 0.5, success 0.25" in lines[0]
    assert "unshown" not in lines[0]


def test_time_left_counts_from_where_a_resumed_stage_begins():
    clock = Clock()
    pace = live.Pace(100, clock)
    clock.now = 10.0
    assert pace.left(90) == 90.0
    clock.now = 20.0
    assert pace.left(91) == 80.0
    assert pace.left(99) == 0.0


def test_an_evaluation_is_one_short_line():
    found = {"success": 0.5, "success_low": 0.25, "success_high": 0.75, "pass@1_low": 0.2, "reward": 0.125}
    found |= {"num_tasks": 512.0, "attempts": 4.0, "failed": 3.0, "truncated": 1.0, "tokens": 45.9}
    text = live.describe_evaluation(found)
    assert text == "success 50.0 % (95 % interval 25.0 % to 75.0 %), reward 0.125, 512 tasks, 3 failed"
    del found["success"]  # an environment that does not say what a success is
    assert live.describe_evaluation(found) == "reward 0.125, 512 tasks, 3 failed"


def test_a_warm_starts_demonstrations_are_not_shown_as_what_the_policy_does():
    metrics = {**METRICS, "policy/loss": 2.0, "rollout/failed": 0.0}
    shown = set(live.shown_metrics("warm_start", metrics))
    assert shown == {"policy/ratio_max_dev", "policy/grad_norm", "policy/loss"}
    assert live.shown_metrics("reinforcement", metrics)["success"] == 0.25
    assert "rollout/failed" not in live.shown_metrics("reinforcement", metrics)
    assert live.shown_metrics("reinforcement", {**metrics, "rollout/failed": 2.0})["rollout/failed"] == 2.0


@pytest.fixture
def shown():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None, legacy_windows=False)
    display = live.LiveDisplay("run", console, Clock())
    yield display, out
    display.close()


def test_the_live_display_shows_numbers_and_says_when_the_ratio_is_exact(shown):
    display, out = shown
    display.begin("reinforcement", 10)
    display.step("reinforcement", 4, METRICS)
    display.close()
    text = out.getvalue()
    assert "reinforcement 5/10" in text
    assert "exactly 0" in text
    assert "1.25" in text


def test_a_stage_is_shown_where_it_was_after_an_evaluation_within_it(shown):
    display, out = shown
    display.begin("reinforcement", 10)
    display.step("reinforcement", 9, METRICS)
    display.begin("eval", 1)
    display.begin("reinforcement", 10)
    display.close()
    last = out.getvalue().rpartition("run  ")[2]
    assert last.startswith("reinforcement 10/10")
    assert "1.25" in last


@pytest.mark.parametrize(
    "text", ["[red]big[/red]", "[/]", "[link=http://x]y[/link]", ":smile:", "\x1b[31mred\x1b[0m", "\r\x07"]
)
def test_text_of_others_is_never_markup_or_control_code(shown, text):
    display, out = shown
    display.note(text)
    display.begin(text, 3)
    display.close()
    lines = io.StringIO()
    live.LineDisplay(lines).note(text)
    expected = text.replace("\x1b", "\\x1b").replace("\r", "\\x0d").replace("\x07", "\\x07")
    assert expected in out.getvalue()
    assert lines.getvalue() == expected + "\n"


def test_only_a_terminal_gets_the_live_display(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert isinstance(live.open_display("auto", "run"), live.LineDisplay)
    assert isinstance(live.open_display("off", "run"), live.LineDisplay)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (65, "1 min 05 s"), (3599.7, "1 h 00 min"), (7620, "2 h 07 min")]
)
def test_durations_read_well(seconds, text):
    assert live.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0"), (1234567, "1,234,567"), (0.123456, "0.1235"), (1e-9, "1e-09")]
)
def test_numbers_read_well(value, text):
    assert live.number(value) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_even_numbers_that_are_none(value):
    assert live.number(value) == str(value)
