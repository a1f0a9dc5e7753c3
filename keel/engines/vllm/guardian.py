"""Runs one command and leaves nothing of it behind, whatever happens to whoever started this.

Started with the interpreter alone (standard library, no package of ours): `python -I guardian.py GRACE_S COMMAND...`.
Its standard input is a pipe that nobody writes to. When the other end closes, because its owner is done or was killed,
the command is asked to end (SIGTERM), and after GRACE_S seconds it and every process that came of it is killed; when
the command ends by itself, what came of it is killed too. Standard output gets a line with the command's process id,
and in the end one with its exit code (negative: the signal that ended it). The command's own output goes to standard
error.

A death signal tied to the parent alone would not do: Linux sends it when the parent's *thread* ends, and children of
the command would outlive it. As their "subreaper" this process inherits all of them, so that none is missed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
KILLED_WITHIN_S = 30.0


def main(grace_s: float, command: list[str]) -> int:
    """Run `command` to its end or this process's; returns the command's exit code."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # runs the clean-up below
    child = subprocess.Popen(  # noqa: S603  (the caller's own command)
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        process_group=0,
        preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),  # noqa: PLW1509  (one thread here)
    )
    try:
        say(str(child.pid))
        while child.poll() is None and not is_closed(sys.stdin.fileno(), wait_s=0.1):
            pass
        if child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(grace_s)
    finally:
        code = kill_all(child)
        say(str(code))
    return 0


def is_closed(descriptor: int, *, wait_s: float) -> bool:
    """Whether the pipe's other end is closed, after at most `wait_s` seconds."""
    readable, _, _ = select.select([descriptor], [], [], wait_s)
    return bool(readable) and not os.read(descriptor, 4096)


def kill_all(child: subprocess.Popen[bytes]) -> int:
    """Kill the command, its process group and all that was inherited from it; returns the command's exit code."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    code = child.wait()
    deadline = time.monotonic() + KILLED_WITHIN_S
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:  # nobody is left
            break
        for process in children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    return code


def children() -> list[int]:
    """Process ids of this process's children, inherited ones included."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()  # state, parent, ...
                if int(fields[1]) == os.getpid():
                    found.append(int(entry.name))
    return found


def say(line: str) -> None:
    """A line to whoever started this, if it is still there."""
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), f"{line}\n".encode())


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
