"""Ctrl-C, once: finish the step, save, say how to go on. Twice: stop now. SIGTERM, which batch systems send, alike."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from keel.monitor.summary import RunSummary

HANDLED = (signal.SIGINT, signal.SIGTERM)
WORDS = {signal.SIGINT: "interrupted from the keyboard", signal.SIGTERM: "ended by SIGTERM"}


class RunInterruptedError(KeyboardInterrupt):
    """The run was asked to stop, has finished its step and saved; `summary` says where it lies and how to resume.

    A KeyboardInterrupt, so that what comes after it in a script or a notebook does not run as if nothing had been.
    """

    def __init__(self, summary: RunSummary) -> None:
        super().__init__(f"{summary.reason}; to go on: keel resume {summary.run_dir}")
        self.summary = summary


class Interrupts:
    """Handles SIGINT and SIGTERM while entered, in the main thread (elsewhere Python has no handlers, and it does
    nothing); afterwards the handlers are what they were. A signal that was being ignored goes on being ignored.

    The first signal is kept in `asked` if `defers()` says that there is something to finish, and `answer(signal)` tells
    what; otherwise, and for the second, KeyboardInterrupt is raised where the main thread is.
    """

    def __init__(self, defers: Callable[[], bool], answer: Callable[[str], None]) -> None:
        self.asked: str = ""  # in words; empty as long as nobody has
        self._defers = defers
        self._answer = answer
        self._before: dict[signal.Signals, Any] = {}
        self._closing = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: one that is not Python's
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextlib.contextmanager
    def held_off(self) -> Iterator[None]:
        """What is short and must not be torn (the last status of a run) is not interrupted."""
        before, self._closing = self._closing, True
        try:
            yield
        finally:
            self._closing = before

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 (Python's signature)
        words = WORDS[signal.Signals(number)]
        if self._closing:
            return
        if not self.asked and self._defers():
            self.asked = words
            self._answer(words)
            return
        raise KeyboardInterrupt(words)
