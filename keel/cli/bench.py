"""`keel bench ...`: what things take on this machine."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keel.cli.arguments import can_be_written

if TYPE_CHECKING:
    from keel.bench.sync import RouteTime

app = typer.Typer(help="Measure what things take on this machine.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """One command for each thing that is measured."""


@app.command()
def sync(
    sizes: Annotated[str, typer.Option(metavar="MIB,...", help="Sizes of the model: 32, 1024.")] = "32,1024",
    routes: Annotated[
        str,
        typer.Option(metavar="ROUTE,...", help="shared, file, gloo, vllm file, vllm gloo, vllm native."),
    ] = "shared,file,gloo",
    repeats: Annotated[int, typer.Option(min=1, help="Pushes that count, after one that does not.")] = 5,
    json_file: Annotated[
        Path | None, typer.Option("--json", callback=can_be_written, help="Write the figures to this file.")
    ] = None,
) -> None:
    """Latency and bandwidth of each route for new weights."""
    from keel.bench.sync import as_json, machine, measure_sync

    facts = machine()
    wanted = [int(size) if size.strip().isdigit() else -1 for size in sizes.split(",")]
    names = [route.strip() for route in routes.split(",")]
    results = measure_sync(wanted, names, repeats=repeats)
    _show(results)
    if json_file is not None:
        command = "keel " + " ".join(shlex.quote(argument) for argument in sys.argv[1:])
        json_file.write_text(json.dumps(as_json(results, facts, command), indent=1) + "\n", encoding="utf-8")


def _show(results: list[RouteTime]) -> None:
    table = Table(box=None)
    for heading in ("route", "MiB", "ms (median)", "ms (worst)", "MiB/s"):
        table.add_column(Text(heading), justify="left" if heading == "route" else "right")
    for each in results:
        rate = "-" if each.mib_per_s is None else f"{each.mib_per_s:,.0f}"
        cells = (each.route, f"{each.num_bytes / 2**20:.0f}", f"{1e3 * each.median_s:,.1f}")
        table.add_row(*map(Text, (*cells, f"{1e3 * max(each.seconds):,.1f}", rate)))
    Console().print(table)
