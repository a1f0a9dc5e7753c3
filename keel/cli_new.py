"""`keel new NAME`: a directory to start from, with an environment, a config and a test that run as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Directory to make, here; letters, digits, _ and -.")],
    data: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Start from these rows, with keel.task_env.")
    ] = None,
    model: Annotated[
        str, typer.Option(metavar="PATH", help="Starting weights; without it a small model made for the run.")
    ] = "",
) -> None:
    """Write a directory NAME with env.py, run.toml and test_env.py that run as they are."""
    raise NotImplementedError
