"""A process of the run's own writes where its threads are when its parent asks for it, even if it hangs."""

from __future__ import annotations

import faulthandler
import signal
from pathlib import Path

READY = "this process writes its stacks here when asked\n"
"""First line of the file. Before it is there, the signal would end the process."""


def write_stacks_when_asked(path: str | Path) -> None:
    """From now on SIGUSR1 appends the stacks of all threads to `path`.

    The handler is `faulthandler`'s, in C: it needs neither the interpreter's lock nor a thread that gets on.
    """
    file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True, chain=False)
    file.write(READY)
    file.flush()
