"""What a run ran on: versions, source, threads, processor. Weights equal to the bit need the same ones.

Nothing secret is recorded: no host or user name, no remote address, no arguments, and of the environment variables
only those named here.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("keel-rl", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "reasoning-gym")
VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "CUDA_VISIBLE_DEVICES",
    "PYTHONHASHSEED",
)
DECIDES_BITS = (
    "cpu",
    "threads",
    "device",
    "packages.torch",
    "packages.transformers",
    "variables.ATEN_CPU_CAPABILITY",
    "variables.ONEDNN_MAX_CPU_ISA",
)
"""Facts that decide floating-point rounding: if one differs, a resumed run may differ in the last bits."""


def collect_environment() -> dict[str, Any]:
    """Facts known without torch; the run adds `threads` and `device` once torch is up (`RunLog.note_environment`)."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": processor_name(),
        "cpu_count": os.cpu_count(),
        "cpu_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": {name: package_version(name) for name in PACKAGES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "git": source_revision(Path(__file__).parent),
    }


def package_version(name: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor_name() -> str:
    """The processor's model name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        found = _output(["sysctl", "-n", "machdep.cpu.brand_string"], Path.cwd())
        if found:
            return found
    return platform.processor() or platform.machine()


def source_revision(directory: Path) -> dict[str, Any] | None:
    """Commit of the source tree and whether it has changes; None if Keel does not run from a git checkout."""
    if _output(["git", "ls-files", "--", "environment.py"], directory) != "environment.py":
        return None  # installed as a package; a checkout around the virtual environment is not ours
    commit = _output(["git", "rev-parse", "HEAD"], directory)
    return {
        "commit": commit,
        "dirty": bool(_output(["git", "status", "--porcelain", "--untracked-files=no"], directory)),
    }


def _output(command: list[str], directory: Path) -> str:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed among the facts that decide bits, one readable line each. A fact missing on one side counts."""
    found = []
    for name in DECIDES_BITS:
        old, new = _lookup(before, name), _lookup(now, name)
        if old != new:
            found.append(f"{name} was {old!r}, is {new!r}")
    return found


def _lookup(facts: Mapping[str, Any], dotted: str) -> Any:
    value: Any = facts
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
