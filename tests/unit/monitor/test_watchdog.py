"""When nothing moves, that is told once, with the stacks; a process that was itself asleep has not stalled."""

from __future__ import annotations

import pytest

from keel.monitor.progress import ChildProcess, Progress, Watched
from keel.monitor.stalls import name_component
from keel.monitor.watchdog import HEARTBEAT_S, Watchdog


class World:
    """A watchdog over a clock that is moved by hand."""

    def __init__(self, directory, stall_timeout_s=10.0):
        self.now = 0.0
        self.progress = Progress()
        self.beats, self.notes, self.alarms = 0, [], []
        self.watchdog = Watchdog(
            self.progress,
            directory,
            stall_timeout_s=stall_timeout_s,
            beat=self.beat,
            note=self.notes.append,
            alarm=self.alarms.append,
            clock=lambda: self.now,
        )

    def beat(self):
        self.beats += 1

    def wait(self, seconds):
        for _ in range(int(seconds)):
            self.now += 1.0
            self.watchdog.tick()


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "stalls")


def test_a_stall_is_told_once_and_again_if_there_is_another(world, tmp_path):
    world.wait(9)
    assert world.alarms == []
    world.wait(20)
    assert len(world.alarms) == 1
    (path,) = (tmp_path / "stalls").iterdir()
    assert str(path) in world.alarms[0]
    assert "nothing has moved for 10 s at the beginning; waits for load" in world.alarms[0]
    assert "test_watchdog.py" in path.read_text()
    world.progress.enter("collect")
    world.wait(1)
    assert world.notes == ["going on again after 30 s"]
    world.wait(12)
    assert len(world.alarms) == 2
    assert len(list((tmp_path / "stalls").iterdir())) == 2


def test_what_fails_in_the_watchdog_is_told_once_and_it_goes_on(world):
    def full():
        raise OSError("no space left on the device")

    world.watchdog._beat = full
    for _ in range(3):
        world.now += HEARTBEAT_S
        world.watchdog._try(world.watchdog.tick)
    assert world.notes == ["the watchdog could not do its part, and goes on: OSError: no space left on the device"]
    world.now += 10
    world.watchdog._try(world.watchdog.tick)
    assert len(world.alarms) == 1


def test_what_counts_as_movement(world):
    count = 0
    world.progress.watched = Watched(counts=lambda: (count,))
    world.watchdog.tick()
    for count in range(30):  # noqa: B007 (read by the lambda)
        world.wait(9)
    assert world.alarms == []


def test_zero_turns_it_off(tmp_path):
    world = World(tmp_path / "stalls", stall_timeout_s=0.0)
    world.wait(100)
    assert world.alarms == []
    assert not (tmp_path / "stalls").exists()


def test_a_machine_that_slept_has_not_stalled(world):
    world.wait(5)
    world.now += 3600.0
    world.watchdog.tick()
    world.wait(4)
    assert world.alarms == []
    world.wait(2)
    assert len(world.alarms) == 1


def test_the_heart_beats_whether_anything_moves_or_not(world):
    world.wait(10 * HEARTBEAT_S)
    assert world.beats == 10


def test_the_component_is_named():
    progress = Progress()
    progress.begin("reinforcement", 2, 10)
    progress.watched = Watched(waiting=lambda: "3 episodes waiting for env.step")
    for phase, states, component in (
        ("collect", [], "rollout: 3 episodes waiting for env.step"),
        ("collect", [("engine", "stopped")], "engine (stopped)"),
        ("publish", [("engine", "sleeping")], "publish"),
        (
            "backward",
            [("learner rank 0", "running"), ("learner rank 1", "running")],
            "learner, backward (learner rank 0, learner rank 1)",
        ),
        ("backward", [("learner rank 0", "running"), ("learner rank 1", "gone")], "learner rank 1 (gone)"),
        ("optimizer", [], "learner, optimizer"),
    ):
        progress.enter(phase)
        assert name_component(progress, states) == component


def test_a_process_that_is_gone_or_not_ready_is_not_signalled(world, tmp_path):
    """It would be the end of it: without a handler, the signal kills."""
    import subprocess
    import sys

    code = "import sys; print('up', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        stacks = str(tmp_path / "never-written")
        world.progress.watched = Watched(processes=lambda: [ChildProcess("engine", child.pid, stacks)])
        world.wait(11)
        assert child.poll() is None
        child.stdin.close()
    assert child.returncode == 0
    (path,) = (tmp_path / "stalls").iterdir()
    assert f"== engine, process {child.pid}, " in path.read_text()
    assert "no answer" in path.read_text()
