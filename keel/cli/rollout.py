"""`keel rollout RUN.toml`: is there a signal to learn from, and what would a step take?"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keel import config_load
from keel.cli.arguments import ConfigFile, Sets, can_be_written
from keel.config_schema import toml_value
from keel.monitor.live import number
from keel.monitor.printable import one_line, printable

if TYPE_CHECKING:
    from keel.signal_result import EpisodePart, RolloutResult
    from keel.types import Trajectory

ABRIDGED = 1000
"""Characters shown of a part of an episode, unless all are asked for."""
WIDTH = 110
"""Columns where the output is no terminal and COLUMNS is not set."""
GUTTERS = {"context": ("c|", "dim"), "policy": ("p>", "green"), "demonstration": ("d>", "cyan")}
STYLES = {"good": "bold green", "thin": "bold yellow", "none": "bold red"}


def rollout(
    config_file: ConfigFile,
    num_episodes: Annotated[
        int, typer.Option("-n", "--num-episodes", min=1, help="Episodes; rounded up to whole groups.")
    ] = 64,
    show: Annotated[bool, typer.Option("--show", help="Print the episode whole, not its long parts cut.")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", callback=can_be_written, help="Write the figures, too.")
    ] = None,
    no_learner: Annotated[
        bool, typer.Option("--no-learner", help="Leave out the learner's pass, for a model that does not fit.")
    ] = False,
    model: Annotated[str, typer.Option(help="Weights to judge as they are, instead of the config's model.")] = "",
    no_warm_start: Annotated[
        bool, typer.Option("--no-warm-start", help="Leave out the warm start that the config begins with.")
    ] = False,
    sets: Sets = None,
) -> None:
    """Play some episodes and tell whether there is a signal to learn from, and what a step would take."""
    instead = [f"model.path={toml_value(model)}", 'model.tiny.preset=""'] if model else []
    config = config_load.load(config_file, [*(sets or ()), *instead])
    config_load.require(config, ("model.path|model.tiny.preset", "env.id"), str(config_file))
    size = config.rollout.group_size
    num_tasks = -(-num_episodes // size)
    if num_tasks * size != num_episodes:
        print(f"{num_episodes} episodes are not whole groups of {size}: playing {num_tasks * size}")
    from keel import signal_check

    warm_start = not (model or no_warm_start)
    result = signal_check.rollout(config, num_tasks=num_tasks, with_learner=not no_learner, warm_start=warm_start)
    if sys.stdout.isatty():
        print_result(result, Console(highlight=False), whole=show)
    else:
        print(as_text(result, whole=show), end="")
    if json_file is not None:
        json_file.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")


def as_text(result: RolloutResult, *, whole: bool = False) -> str:
    """What `print_result` prints, for a file or a pipe: no colours, no blanks at the end of a line."""
    width = None if "COLUMNS" in os.environ else WIDTH
    console = Console(file=io.StringIO(), highlight=False, width=width)
    with console.capture() as captured:
        print_result(result, console, whole=whole)
    return "\n".join(line.rstrip() for line in captured.get().split("\n"))


def print_result(result: RolloutResult, console: Console, *, whole: bool = False) -> None:
    """An episode, the figures, the verdict. Only `Text`, never a string: rich reads strings as markup."""
    print_episode(result.shown, result.episode, console, whole=whole)
    console.print()
    table = Table.grid(padding=(0, 2))
    for label, text in result.rows():
        table.add_row(Text(label), Text(text, overflow="fold"))
    console.print(table)
    console.print()
    for note in result.notes:
        _print_marked(console, "note:", note, "dim")
    judgement = result.judgement
    console.print(Text(judgement.text, style=STYLES[judgement.level]))
    for cause in judgement.causes:
        _print_marked(console, "-", cause.seen)
        _print_marked(console, "  what to do:", cause.advice)


def print_episode(shown: Trajectory, parts: tuple[EpisodePart, ...], console: Console, *, whole: bool = False) -> None:
    """An episode's tokens as text, turn by turn, a mark before each line telling who they are from.

    What a model or a tool wrote stays in a column of its own, so no line of it can pass for one of ours.
    """
    _print_marked(console, "episode:", _headline(shown), "bold")
    console.print(Text("c| was read by the policy, p> was drawn by it", style="dim"))
    for part in parts:
        mark, style = GUTTERS[part.origin]
        console.print(Text(f"turn {part.turn + 1}, {part.origin}, {part.num_tokens} tokens", style="bold dim"))
        _print_marked(console, mark, printable(part.text, limit=None if whole else ABRIDGED), style)
        malformed = shown.turns[part.turn].malformed if part.origin == "policy" and part.turn >= 0 else None
        if malformed is not None:
            _print_marked(console, "could not be read:", one_line(malformed, limit=300), "red")


def _print_marked(console: Console, mark: str, text: str, style: str = "") -> None:
    """The lines of `text`, with `mark` before each; where one is folded, it goes on in its own column."""
    table = Table.grid(padding=(0, 1))
    for line in text.split("\n"):
        table.add_row(Text(mark, style=style), Text(line, style=style, overflow="fold"))
    console.print(table)


def _headline(shown: Trajectory) -> str:
    success = "" if shown.success is None else f", {'a success' if shown.success else 'no success'}"
    parts = ", ".join(f"{one_line(name, limit=80)} {number(value)}" for name, value in shown.reward_parts.items())
    error = f" ({one_line(shown.error, limit=300)})" if shown.error else ""
    earned = "" if shown.failed else f", reward {number(shown.reward)}{f' ({parts})' if parts else ''}"
    task = one_line(shown.task.id, limit=80)
    return f"attempt {shown.attempt} at task {task}: {shown.status}{error}{earned}{success}"
