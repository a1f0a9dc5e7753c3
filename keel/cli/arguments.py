"""Arguments and exit codes that several commands share. A command of its own room is a function in `keel/cli/<name>.py`
and one line of registration in `keel.cli.program`; whatever needs torch is imported inside the function.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_CHECK = 3
EXIT_STOPPED = 4
EXIT_INTERRUPTED = 130

Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.OPTION=VALUE", help="Set an option; may be repeated.")
]
ConfigFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run's config, or a name of `keel recipes`.")]


def can_be_written(file: Path | None) -> Path | None:
    """The callback of an option that names a file to write: what cannot be is refused before the work, not after it."""
    if file is None:
        return None
    place = file.absolute().parent
    if file.is_dir():
        raise typer.BadParameter(f"{file} is a directory; name a file")
    if not place.is_dir():
        raise typer.BadParameter(f"{file.parent} is no directory; make it first")
    if not os.access(place, os.W_OK):
        raise typer.BadParameter(f"{file.parent} may not be written to; choose another directory")
    return file
