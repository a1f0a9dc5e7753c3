"""Whatever happens to whoever started a command under the guardian, nothing of the command is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from keel.engines.vllm.command import guarded

# A command that starts a child in a session of its own and says both process ids.
FAMILY = """
import os, signal, subprocess, sys, time
if sys.argv[1] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
print(child.pid, flush=True, file=open(sys.argv[2], "w"))
if sys.argv[1] == "brief":
    sys.exit(7)
time.sleep(1000)
"""


class Family:
    """A command under the guardian, with a child that its parent does not end."""

    def __init__(self, kind: str, directory: Path) -> None:
        told = directory / "child"
        os.mkfifo(told)
        command = guarded([sys.executable, "-c", FAMILY, kind, str(told)], grace_s=0.2)
        self.guardian = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self.guardian.stdout is not None
        self.pid = int(self.guardian.stdout.readline())
        self.child = int(told.read_text())

    def is_gone(self) -> bool:
        for process in (self.pid, self.child):
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(process).wait(timeout=30)
        return not any(psutil.pid_exists(process) for process in (self.pid, self.child))

    def told_code(self) -> int:
        assert self.guardian.stdout is not None
        return int(self.guardian.stdout.readline())


@pytest.mark.parametrize(("kind", "code"), [("obedient", -signal.SIGTERM), ("stubborn", -signal.SIGKILL)])
def test_closing_the_pipe_ends_the_command_and_its_children(kind: str, code: int, tmp_path: Path) -> None:
    family = Family(kind, tmp_path)
    assert family.guardian.stdin is not None
    family.guardian.stdin.close()
    assert family.told_code() == code
    assert family.is_gone()
    assert family.guardian.wait(30) == 0


def test_a_command_that_ends_takes_its_children_along(tmp_path: Path) -> None:
    family = Family("brief", tmp_path)
    assert family.told_code() == 7
    assert family.is_gone()


def test_a_command_that_is_killed_takes_its_children_along(tmp_path: Path) -> None:
    family = Family("obedient", tmp_path)
    os.kill(family.pid, signal.SIGKILL)
    assert family.told_code() == -signal.SIGKILL
    assert family.is_gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_guardian_that_is_ended_leaves_no_command(number: int, tmp_path: Path) -> None:
    """Killed outright it can end nobody any more: the command itself still gets its death signal."""
    family = Family("obedient", tmp_path)
    family.guardian.send_signal(number)
    family.guardian.wait(30)
    psutil.wait_procs([psutil.Process(family.pid)] if psutil.pid_exists(family.pid) else [], timeout=30)
    assert not psutil.pid_exists(family.pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(family.child, signal.SIGKILL)


OWNER = """
import os, subprocess, sys
guardian = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
print(int(guardian.stdout.readline()), flush=True)
sys.stdin.readline()
os.kill(os.getpid(), 9)
"""


def test_an_owner_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    told = tmp_path / "child"
    os.mkfifo(told)
    command = guarded([sys.executable, "-c", FAMILY, "obedient", str(told)], grace_s=0.2)
    owner = subprocess.Popen([sys.executable, "-c", OWNER, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = int(told.read_text())
    assert owner.stdin is not None
    assert owner.stdout is not None
    server = int(owner.stdout.readline())
    owner.stdin.close()
    assert owner.wait(30) == -signal.SIGKILL
    for process in (server, child):
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(process).wait(timeout=30)
        assert not psutil.pid_exists(process)
