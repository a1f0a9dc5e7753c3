"""A trainer in a process of its own that takes one step when told to.

Each side so has its own memory to be measured, and neither finds the other's threads, caches or garbage in its way:
between its steps a side waits at a pipe.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from keel.bench.measure import BenchError

Report = dict[str, Any]


class Gate:
    """Where a side waits between its steps."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def wait(self, report: Report) -> bool:
        """Say that it is ready (the first time) or what the last step was like; whether another step is wanted."""
        self._pipe.send(("report", {**report, "cpu_s": time.process_time()}))
        try:
            self._pipe.recv()
        except EOFError:
            return False
        return True


class Side(AbstractContextManager["Side"]):
    """`run(gate, **arguments)` in a fresh process; `step()` takes the next step and returns what it reports.

    What the process prints goes to a file. Raises BenchError with the traceback if the process fails.
    """

    def __init__(self, run: Callable[..., None], **arguments: Any) -> None:
        """Start the process and wait until it is ready; `ready` is what it said then."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._log = tempfile.NamedTemporaryFile(prefix="keel-bench-", suffix=".log")  # noqa: SIM115 (closed in close)
        self._process = context.Process(target=_serve, args=(theirs, self._log.name, run, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.reports: list[Report] = []
        self._cpu_s = 0.0
        self.ready = self._answer()

    def step(self) -> Report:
        """Take one step. "others_share" of its report is the share of all cores that other processes had meanwhile."""
        begun, busy_s, own_s = time.perf_counter(), busy_seconds(), self._cpu_s
        self._pipe.send("step")
        report = self._answer()
        others_s = busy_seconds() - busy_s - (self._cpu_s - own_s)
        share = max(0.0, others_s) / (time.perf_counter() - begun) / (os.cpu_count() or 1)
        self.reports.append({**report, "others_share": share})
        return self.reports[-1]

    def close(self) -> None:
        """End the process."""
        self._pipe.close()  # nobody asks for another step
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> Report:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            said = Path(self._log.name).read_text(encoding="utf-8", errors="replace")
            raise BenchError(f"a side's process ended: {said[-3000:]}") from None
        if kind == "failed":
            raise BenchError(f"a side failed: {value}")
        answer: Report = value
        self._cpu_s = answer["cpu_s"]
        return answer


def busy_seconds() -> float:
    """Processor seconds that all cores have spent at work since the machine started, stolen ones included."""
    first = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    user, nice, system, _, _, interrupts, soft, stolen = map(int, first[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def _serve(pipe: Connection, log: str, run: Callable[..., None], arguments: Mapping[str, Any]) -> None:
    printed = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(printed, stream.fileno())
    try:
        run(Gate(pipe), **arguments)
    except Exception:  # noqa: BLE001 (whatever it is, the parent tells it)
        pipe.send(("failed", traceback.format_exc()))
