"""A thread beside the run: it keeps the heartbeat in status.json, and notices when nothing gets on any more."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from keel.monitor.live import duration
from keel.monitor.progress import Progress
from keel.monitor.stalls import name_component, process_state, write_stall

TICK_S = 1.0
HEARTBEAT_S = 5.0
ASLEEP_S = 30.0
"""A tick that took longer than this means that this process itself was not running (a suspended machine, SIGSTOP)."""


class Watchdog:
    """Between `start` and `stop`.

    `beat` is called every few seconds, `alarm(text)` once for each stall, when nothing has moved for `stall_timeout_s`
    (0: never), `note(text)` when the run moves again and for texts given to `say`. All are called from the thread.
    """

    def __init__(
        self,
        progress: Progress,
        directory: Path,
        *,
        stall_timeout_s: float,
        beat: Callable[[], None],
        note: Callable[[str], None],
        alarm: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.moved_unix_s = time.time()
        self._progress = progress
        self._directory = directory
        self._stall_timeout_s = stall_timeout_s
        self._beat, self._note, self._alarm = beat, note, alarm
        self._clock = clock
        self._texts = queue.SimpleQueue[str | None]()
        self._counts = progress.counts()
        self._still_since = self._ticked = self._beaten = clock()
        self._stalled = self._failed = False
        self._thread = threading.Thread(target=self._watch, name="keel-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it; what was said before is shown first."""
        if self._thread.is_alive():
            self._texts.put(None)
            self._thread.join()

    def say(self, text: str) -> None:
        """Show a note soon. For signal handlers, which must not write: what they interrupt may be writing."""
        self._texts.put(text)

    def _watch(self) -> None:
        while True:
            try:
                text = self._texts.get(timeout=TICK_S)
            except queue.Empty:
                self._try(self.tick)
                continue
            if text is None:
                self._try(self.tick)  # what has moved since the last look is told too
                return
            self._try(functools.partial(self._note, text))

    def _try(self, act: Callable[[], None]) -> None:
        """A full disk, or a terminal that is gone, is the run's to notice; the watch goes on, and says once that it
        could not do its part."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 (what watches must neither end a run nor cease to watch it)
            if not self._failed:
                self._failed = True
                with contextlib.suppress(Exception):
                    self._note(f"the watchdog could not do its part, and goes on: {type(error).__name__}: {error}")

    def tick(self) -> None:
        """Look once; the thread does every second."""
        now = self._clock()
        if now - self._ticked > ASLEEP_S:
            self._still_since += now - self._ticked
        self._ticked = now
        counts = self._progress.counts()
        if counts != self._counts:
            self._counts, self.moved_unix_s = counts, time.time()
            if self._stalled:
                self._note(f"going on again after {duration(now - self._still_since)}")
            self._still_since, self._stalled = now, False
        elif 0 < self._stall_timeout_s <= now - self._still_since and not self._stalled:
            self._stalled = True
            self._tell_stall(now - self._still_since)
        if now - self._beaten >= HEARTBEAT_S:
            self._beaten = now
            self._beat()

    def _tell_stall(self, still_s: float) -> None:
        progress = self._progress
        states = [(child.name, process_state(child.pid)) for child in progress.watched.processes()]
        component = name_component(progress, states)
        path = write_stall(self._directory, progress, still_s, component)
        self._alarm(
            f"nothing has moved for {duration(still_s)} at {progress.where()}; waits for {component}; "
            f"the stacks of all processes are in {path}"
        )
