"""Signals in this very process: who is asked to stop, who is stopped, and that handlers are what they were."""

from __future__ import annotations

import signal
import threading

import pytest

from keel.config import TrainConfig
from keel.monitor.interrupts import HANDLED, Interrupts, RunInterruptedError
from keel.monitor.rows import read_json
from keel.monitor.runlog import RunLog


@pytest.fixture(autouse=True)
def handlers_are_restored():
    """As in a program of a terminal's; pytest itself may be a background job, which ignores SIGINT."""
    own = [signal.signal(number, signal.default_int_handler) for number in HANDLED]
    yield
    assert [signal.getsignal(number) for number in HANDLED] == [signal.default_int_handler] * len(HANDLED)
    for number, handler in zip(HANDLED, own, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(run_dir=str(tmp_path / "run"), steps=3)


def test_the_first_signal_asks_the_second_stops():
    answers = []
    with Interrupts(lambda: True, answers.append) as interrupts:
        signal.raise_signal(signal.SIGTERM)
        assert (interrupts.asked, answers) == ("ended by SIGTERM", ["ended by SIGTERM"])
        with pytest.raises(KeyboardInterrupt, match="interrupted from the keyboard"):
            signal.raise_signal(signal.SIGINT)
        assert answers == ["ended by SIGTERM"]


def test_with_nothing_to_finish_the_first_signal_stops():
    with Interrupts(lambda: False, print) as interrupts, pytest.raises(KeyboardInterrupt, match="ended by SIGTERM"):
        signal.raise_signal(signal.SIGTERM)
    assert interrupts.asked == ""


def test_what_was_ignored_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts(lambda: False, print):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_must_not_be_torn_is_not_interrupted():
    with Interrupts(lambda: False, print) as interrupts, interrupts.held_off():
        signal.raise_signal(signal.SIGINT)
    assert interrupts.asked == ""


def test_another_thread_has_no_handlers_to_set():
    seen = []

    def enter():
        with Interrupts(lambda: True, print):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_a_run_is_asked_once_and_ends_where_it_can_be_resumed(config):
    with pytest.raises(KeyboardInterrupt) as caught, RunLog.open(config) as run:
        assert run.asked_to_stop().goes
        run.progress.begin("reinforcement", 0, 3)
        signal.raise_signal(signal.SIGINT)
        run.log_step(0, {})
        asked = run.asked_to_stop()
        assert (asked.action, asked.stops) == ("interrupt", True)
        run.end(asked)
    error = caught.value
    assert isinstance(error, RunInterruptedError)
    assert error.summary.state == "interrupted"
    assert f"keel resume {config.run_dir}" in str(error)
    assert read_json(run.paths.status)["state"] == "interrupted"
    assert read_json(run.paths.summary)["reason"] == "interrupted from the keyboard after reinforcement step 1 of 3"


def test_a_run_with_nothing_left_to_do_is_done(config):
    with RunLog.open(config) as run:
        run.progress.begin("reinforcement", 2, 3)
        signal.raise_signal(signal.SIGINT)
        for step in range(3):
            run.log_step(step, {})
        assert run.asked_to_stop().goes
    assert read_json(run.paths.status)["state"] == "completed"


def test_before_the_first_step_a_run_stops_at_once(config):
    with pytest.raises(KeyboardInterrupt), RunLog.open(config) as run:
        signal.raise_signal(signal.SIGTERM)
    status = read_json(run.paths.status)
    assert (status["state"], status["reason"]) == ("interrupted", "ended by SIGTERM")
