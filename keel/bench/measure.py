"""How everything in `keel bench` is timed and written down.

Two programs are compared by running them alternately in one process and taking the ratio of each round: what slows the
machine for a while slows both, and drops out of a ratio but not out of two medians taken one after the other.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from keel.monitor.environment import collect_environment, package_version
from keel.types import UserFault


class BenchError(UserFault, ValueError):
    """Something was asked for that cannot be measured, or two programs that should agree do not."""


@dataclass(frozen=True)
class Ratio:
    """How many times as long one program takes as another: the median of the rounds' ratios, the lowest, the highest.

    Seconds of the peer by seconds of ours: above 1, ours is faster.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Times:
    """Seconds of each contender in each counted round; the same index is the same round."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """The middle of `name`'s seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, peer: str, ours: str) -> Ratio:
        """The peer's time by ours, round by round."""
        each = [theirs / own for theirs, own in zip(self.seconds[peer], self.seconds[ours], strict=True)]
        return Ratio(statistics.median(each), min(each), max(each))


@dataclass(frozen=True)
class BenchResult:
    """One benchmark's figures as they are committed.

    A row is flat. Where it compares two programs its keys are "case", "ours", "peer", "ours_ms", "peer_ms" (medians),
    "ratio", "low", "high" (`Times.ratio`: above 1, ours is faster) and "equal_to" (how far the results were apart); it
    may have others, whose names end in their unit (`_ms`, `_mib`, `_per_s`).
    """

    benchmark: str
    command: str
    machine: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    notes: Sequence[str] = field(default_factory=tuple)

    def write(self, path: Path) -> None:
        """As JSON, a row to a line: a change of one figure is a change of one line."""
        facts = asdict(self)
        rows = ",\n".join(f"  {json.dumps(row)}" for row in facts.pop("rows"))
        head = json.dumps(facts, indent=1).removesuffix("\n}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")


def machine(*packages: str) -> dict[str, Any]:
    """What the figures are measured on: processor, versions (those of peers in `packages` too), threads, load before.

    Take it before measuring: the load is then what others put on the machine.
    """
    facts = collect_environment()
    facts["packages"] |= {name: package_version(name) for name in packages}
    load = [round(value, 2) for value in os.getloadavg()]
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {**facts, "gpu": card, "threads": torch.get_num_threads(), "load": load}


def command_line() -> str:
    """The command that is running, to be committed beside its figures."""
    return "keel " + " ".join(shlex.quote(argument) for argument in sys.argv[1:])


def alternately(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    warmups: int = 1,
    finish: Callable[[], Any] = lambda: None,
) -> Times:
    """Each contender once a round, each time another one first; `warmups` rounds before that do not count.

    Garbage is collected between contenders, never while one runs. `finish` ends what a contender only began, within its
    time (`torch.cuda.synchronize`). Raises BenchError for no contender or no round.
    """
    if not contenders or rounds < 1:
        raise BenchError(f"nothing to time: {len(contenders)} contenders, {rounds} rounds; give at least one of each")
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmups + rounds):
        first = index % len(names)
        for name in (*names[first:], *names[:first]):
            taken = timed(contenders[name], finish)
            if index >= warmups:
                seconds[name].append(taken)
    return Times({name: tuple(values) for name, values in seconds.items()})


def timed(function: Callable[[], Any], finish: Callable[[], Any] = lambda: None) -> float:
    """Seconds of one call and its `finish`, without garbage collection."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        finish()
        begun = time.perf_counter()
        function()
        finish()
        return time.perf_counter() - begun
    finally:
        if was_enabled:
            gc.enable()


def require_close(case: str, ours: torch.Tensor, peer: torch.Tensor, *, tolerance: float) -> float:
    """The largest difference of two results, by the peer's largest value; both are taken to float64.

    Raises BenchError if it is above `tolerance` or not a number: what differs is not compared in time.
    """
    if ours.shape != peer.shape:
        raise BenchError(f"{case}: the results have shapes {tuple(ours.shape)} and {tuple(peer.shape)}")
    wide, other = ours.detach().double(), peer.detach().double()
    scale = max(float(other.abs().max()), torch.finfo(torch.float64).tiny) if other.numel() else 1.0
    difference = float((wide - other).abs().max()) / scale if other.numel() else 0.0
    if not difference <= tolerance:
        raise BenchError(f"{case}: the results differ by {difference:.2g} of the largest value, above {tolerance:.2g}")
    return difference


def peak_bytes(function: Callable[[], Any]) -> int:
    """Resident memory of this process at its peak in a call, above what was resident before it. Linux only.

    Memory that a first call keeps (a library's buffers) is counted too: call once before, or see `peak_bytes_apart`.
    Raises BenchError where the system does not tell.
    """
    before = forget_peak()
    function()
    return max(0, peak_resident_bytes() - before)


def forget_peak() -> int:
    """Begin to measure a peak anew; what is resident now. Linux only; raises BenchError elsewhere.

    What was freed is handed back to the system first, so that its reuse is counted.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError) as error:
        raise BenchError(f"peak memory cannot be measured on this system: {error}; it needs Linux and glibc") from error
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """The most that was resident since `forget_peak`."""
    return _status_bytes("VmHWM")


def peak_bytes_apart(target: str, **arguments: Any) -> int:
    """`peak_bytes` in a fresh process, where nothing ran before that could leave memory behind.

    `target` is "module:function" of a function that takes `arguments` (plain values), prepares the inputs and returns
    what is to be called; what it prepares is not counted, nor is a first call, for which it provides itself if wanted.
    Raises BenchError with what the process wrote if it fails.
    """
    command = [sys.executable, "-m", "keel.bench.measure", target, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise BenchError(f"peak memory of {target}: the process ended with {done.returncode}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise BenchError(f"peak memory cannot be measured: /proc/self/status has no {name}")


def _measure_target(arguments: Iterable[str]) -> int:
    target, options = arguments
    module, _, name = target.partition(":")
    prepare = getattr(importlib.import_module(module), name)
    return peak_bytes(prepare(**json.loads(options)))


if __name__ == "__main__":
    sys.stdout.write(f"{_measure_target(sys.argv[1:])}\n")
