from __future__ import annotations

from keel.config import ReportConfig
from keel.report import write
from keel.report.live import LiveReport


class Clock:
    """Time that passes when told to; writing a report takes `cost` of it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.cost = 0.0
        self.writes: list[tuple[float, int | None]] = []
        self.fault: Exception | None = None

    def __call__(self) -> float:
        return self.now

    def write(self, run_dir, out, **limits):
        self.writes.append((self.now, limits.get("max_steps")))
        self.now += self.cost
        if self.fault is not None:
            raise self.fault


def run_for(seconds, clock, monkeypatch, every_s=60.0, *, at_end=True):
    monkeypatch.setattr(write, "write_report", clock.write)
    told = []
    report = LiveReport("run", ReportConfig(every_s=every_s, at_end=at_end), tell=told.append, clock=clock)
    step = 0
    while clock.now < seconds:
        clock.now += 1.0
        step += 1
        report.log(step, {})
    report.close()
    return told


def test_a_report_comes_every_so_often_and_at_the_end(monkeypatch):
    clock = Clock()
    run_for(200, clock, monkeypatch)
    assert [at for at, _ in clock.writes] == [60, 120, 180, 200]
    assert [steps for _, steps in clock.writes] == [6, 6, 6, None]


def test_reports_on_the_way_take_a_two_hundredth_of_the_time_at_most(monkeypatch):
    clock = Clock()
    clock.cost = 5.0
    run_for(5_000, clock, monkeypatch, every_s=1.0)
    assert len(clock.writes) == 6
    assert (len(clock.writes) - 1) * clock.cost <= 0.0051 * clock.now


def test_zero_means_none_on_the_way_and_the_end_can_be_switched_off_too(monkeypatch):
    clock = Clock()
    run_for(500, clock, monkeypatch, every_s=0.0)
    assert [at for at, _ in clock.writes] == [500]
    clock = Clock()
    run_for(500, clock, monkeypatch, every_s=0.0, at_end=False)
    assert clock.writes == []


def test_a_report_that_fails_is_told_of_once_and_ends_nothing(monkeypatch):
    clock = Clock()
    clock.fault = OSError("no space left on the device")
    told = run_for(200, clock, monkeypatch)
    assert told == ["the report could not be written, the run goes on: OSError: no space left on the device"]
    assert len(clock.writes) == 4
