"""What a run that does not get on leaves for whoever looks: RUN/stalls/<time>.txt.

It says what the run waits for, in what state its processes are, and where every thread of each of them stands. Stacks
are `faulthandler`'s: files, lines and function names, no values, so nothing secret is in them.
"""

from __future__ import annotations

import datetime as dt
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import psutil

from keel.monitor.live import duration
from keel.monitor.printable import printable
from keel.monitor.progress import ChildProcess, Progress
from keel.secrecy import scrubbed

ANSWER_TIMEOUT_S = 3.0
"""Seconds that a process is given to write its stacks; one that was stopped never does."""
LEARNS = ("pack", "score", "backward", "optimizer", "save")


def name_component(progress: Progress, states: Sequence[tuple[str, str]]) -> str:
    """Which part the run waits for, as well as can be told from outside, and why that one.

    `states` are names and operating-system states of the run's other processes.
    """
    odd = [f"{name} ({state})" for name, state in states if state in ("stopped", "zombie", "gone")]
    if odd:
        return ", ".join(odd)
    waiting = progress.watched.waiting() if progress.phase in ("collect", "evaluate") else ""
    if waiting:
        return f"rollout: {waiting}"
    if progress.phase in LEARNS:
        ranks = [name for name, _ in states if name.startswith("learner")]
        return f"learner, {progress.phase}" + (f" ({', '.join(ranks)})" if ranks else "")
    return progress.phase


def process_state(pid: int) -> str:
    """ "running", "sleeping", "stopped" (by a signal), "zombie", "gone", ..."""
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return "gone"


def write_stall(directory: Path, progress: Progress, still_s: float, component: str) -> Path:
    """Write a file with the stacks of this process and of `progress.watched.processes()`; returns its path."""
    directory.mkdir(exist_ok=True)
    stamp = dt.datetime.now(tz=dt.UTC).strftime("%Y%m%d-%H%M%S")
    path = next(path for number in range(1, 1000) if not (path := directory / f"{stamp}{_suffix(number)}.txt").exists())
    with path.open("w", encoding="utf-8") as file:
        file.write(f"nothing has moved for {duration(still_s)}\n")
        file.write(f"waits for: {printable(scrubbed(component), limit=4000)}\n")
        file.write(f"at: {printable(scrubbed(progress.told()), limit=4000)}\n")
        _write_own(file)
        for child in progress.watched.processes():
            _write_child(file, child)
    return path


def _suffix(number: int) -> str:
    return "" if number == 1 else f"-{number}"


def _write_own(file: TextIO) -> None:
    file.write(f"\n== main process {os.getpid()} ==\nthreads:\n")
    file.writelines(f"  0x{thread.ident or 0:016x} {thread.name}\n" for thread in threading.enumerate())
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)


def _write_child(file: TextIO, child: ChildProcess) -> None:
    state = process_state(child.pid)
    file.write(f"\n== {child.name}, process {child.pid}, {state} ==\n")
    answer = _ask(child) if state != "gone" else ""
    if not answer and state == "stopped":
        answer = "it was stopped by a signal (SIGSTOP, SIGTSTP) and cannot answer; SIGCONT lets it go on\n"
    file.write(answer or "no answer\n")
    file.flush()


def _ask(child: ChildProcess) -> str:
    """What the process writes when asked for its stacks; "" if it does not, or is not ready to be asked."""
    path = Path(child.stacks)
    before = path.stat().st_size if path.is_file() else 0
    if before == 0:
        return ""
    try:
        os.kill(child.pid, signal.SIGUSR1)
    except OSError:
        return ""
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    size = before
    while time.monotonic() < deadline:
        time.sleep(0.05)
        grown = path.stat().st_size
        if grown > before and grown == size:
            break  # and has stopped growing
        size = grown
    return path.read_bytes()[before:].decode("utf-8", "replace")
