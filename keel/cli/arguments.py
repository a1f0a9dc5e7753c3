"""Arguments and exit codes that several commands share. A command of its own room is a function in `keel/cli/<name>.py`
and one line of registration in `keel.cli.program`; whatever needs torch is imported inside the function.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXIT_FAILED = 1
EXIT_STOPPED = 4
EXIT_INTERRUPTED = 130

Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.OPTION=VALUE", help="Set an option; may be repeated.")
]
ConfigFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run's config, or a name of `keel recipes`.")]
