"""How much memory this machine has and this process holds. No torch."""

from __future__ import annotations

from pathlib import Path

import psutil

_LIMIT_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def machine_bytes() -> int:
    """Memory that programs may use here: the machine's, or the container's limit where that is lower."""
    total = int(psutil.virtual_memory().total)
    for file in _LIMIT_FILES:
        try:
            text = file.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal():
            return min(total, int(text))
    return total


def resident_bytes() -> int:
    """What of this process lies in memory now."""
    return int(psutil.Process().memory_info().rss)
