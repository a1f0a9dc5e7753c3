"""The weights that a server had last, kept so that one that died gets them again, whatever the learner is at."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from keel.sync.base import WeightSource

PREFIX = "keel-vllm-weights-"


@dataclass(frozen=True)
class Snapshot:
    """Weights under their version. `source` stays readable until `remove`."""

    source: WeightSource
    version: int

    @classmethod
    def take(cls, source: WeightSource, version: int) -> Snapshot:
        """Keep what lies at `source`: by a hard link where its files allow that (no byte is copied; the learner writes
        every version to a new file), else by a copy beside them. A broadcast leaves nothing to keep.

        Raises OSError if there is no room for a copy.
        """
        if source.kind != "file":
            return cls(source, version)
        place = Path(source.location)
        remove_abandoned(place.parent)
        kept = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=place.parent))
        for file in place.iterdir():
            try:
                (kept / file.name).hardlink_to(file)
            except OSError:
                shutil.copy2(file, kept / file.name)
        return cls(WeightSource("file", str(kept)), version)

    def remove(self) -> None:
        if self.source.kind == "file":
            shutil.rmtree(self.source.location, ignore_errors=True)


def remove_abandoned(place: Path) -> None:
    """Delete what runs that were killed have left in `place`, which may be shared memory."""
    for directory in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(ValueError, OSError):
            owner = int(directory.name.removeprefix(PREFIX).split("-")[0])
            if not _runs(owner) and directory.stat().st_uid == os.getuid():
                shutil.rmtree(directory, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
