"""`keel rollout RUN.toml`: is there a signal to learn from, and what would a step take?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keel.cli_arguments import ConfigFile, Sets


def rollout(
    config_file: ConfigFile,
    num_episodes: Annotated[
        int, typer.Option("-n", "--num-episodes", min=1, help="Episodes; rounded up to whole groups.")
    ] = 64,
    show: Annotated[bool, typer.Option("--show", help="Print the episode whole, not its long parts cut.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures, too.")] = None,
    no_learner: Annotated[
        bool, typer.Option("--no-learner", help="Leave out the learner's pass, for a model that does not fit.")
    ] = False,
    sets: Sets = None,
) -> None:
    """Play some episodes and tell whether there is a signal to learn from, and what a step would take."""
    raise NotImplementedError
