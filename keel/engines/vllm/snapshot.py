"""The weights that a server had last, kept so that one that died gets them again, whatever the learner is at."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from keel.sync.base import WeightSource
from keel.sync.transports import KEPT, own_directory


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
        kept = Path(own_directory(KEPT, place.parent))
        for file in place.iterdir():
            try:
                (kept / file.name).hardlink_to(file)
            except OSError:
                shutil.copy2(file, kept / file.name)
        return cls(WeightSource("file", str(kept)), version)

    def remove(self) -> None:
        if self.source.kind == "file":
            shutil.rmtree(self.source.location, ignore_errors=True)
