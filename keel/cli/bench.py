"""`keel bench ...`: what things take on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keel.cli.arguments import can_be_written

if TYPE_CHECKING:
    from keel.bench.measure import BenchResult
    from keel.bench.sync import RouteTime

JsonFile = Annotated[
    Path | None, typer.Option("--json", callback=can_be_written, help="Write the figures to this file.")
]
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
    json_file: JsonFile = None,
) -> None:
    """Latency and bandwidth of each route for new weights."""
    from keel.bench.measure import command_line, machine
    from keel.bench.sync import as_json, measure_sync

    facts = machine()
    wanted = [int(size) if size.strip().isdigit() else -1 for size in sizes.split(",")]
    names = [route.strip() for route in routes.split(",")]
    results = measure_sync(wanted, names, repeats=repeats)
    _show(results)
    if json_file is not None:
        text = json.dumps(as_json(results, facts, command_line()), indent=1)
        json_file.write_text(f"{text}\n", encoding="utf-8")


@app.command()
def prefixes(
    cases: Annotated[
        str, typer.Option(metavar="PROMPTxREPLY,...", help="Tokens of a group's prompt and of its longest reply.")
    ] = "16x128,32x64,128x64,512x64,128x256,1024x256",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, after one that does not.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """The learner's update with what sequences have in common computed once, and without."""
    from keel.bench.prefixes import measure_prefixes

    tell(measure_prefixes(cases.split(","), dtype=dtype, rounds=rounds), json_file)


@app.command()
def step(
    cases: Annotated[
        str, typer.Option(metavar="CASE,...", help="64, 256 (new tokens), tool (2 x 64).")
    ] = "64,256,tool",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, after one that does not.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each side.")] = 2,
    trl_rows: Annotated[int, typer.Option(min=1, help="Sequences that TRL computes at once; a divisor of 64.")] = 8,
    trl_experts: Annotated[str, typer.Option(help="transformers' experts for TRL: eager, grouped_mm.")] = "eager",
    profile: Annotated[bool, typer.Option(help="Where a step of Keel's spends its time, instead.")] = False,
    json_file: JsonFile = None,
) -> None:
    """A whole training step beside TRL's GRPOTrainer: generate, score, update, memory."""
    from keel.bench.measure import BenchResult, command_line, machine
    from keel.bench.step.measure import NOTES, PROFILE_NOTES, measure_steps, profile_steps

    facts = {**machine("trl", "accelerate", "datasets"), "threads": threads}
    names = [case.strip() for case in cases.split(",")]
    if profile:
        result = BenchResult(
            "step, profile", command_line(), facts, profile_steps(names, threads=threads), PROFILE_NOTES
        )
    else:
        rows = measure_steps(names, rounds=rounds, threads=threads, trl_rows=trl_rows, trl_experts=trl_experts)
        result = BenchResult("step", command_line(), facts, rows, NOTES)
    tell(result, json_file)


@app.command()
def attention(
    parts: Annotated[
        str, typer.Option(metavar="PART,...", help="speed (beside eager, beside no sinks), window, memory.")
    ] = "speed,window,memory",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which everybody runs once.")] = 5,
    json_file: JsonFile = None,
) -> None:
    """Attention with sinks, forward and backward, beside transformers' eager and beside the stock kernel without."""
    from keel.bench.attention import measure_attention

    tell(measure_attention(rounds=rounds, parts=[part.strip() for part in parts.split(",")]), json_file)


@app.command()
def experts(
    sizes: Annotated[str, typer.Option(metavar="HIDDEN,...", help="Hidden sizes: 128, 256, 2880.")] = "128,256,2880",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which everybody runs once.")] = 9,
    json_file: JsonFile = None,
) -> None:
    """A layer's experts, forward and backward, beside transformers' and beside bare matrix products."""
    from keel.bench.experts import measure_experts

    wanted = [int(size) if size.strip().isdigit() else -1 for size in sizes.split(",")]
    tell(measure_experts(wanted, rounds=rounds), json_file)


@app.command()
def logprobs(
    types: Annotated[str, typer.Option(metavar="TYPE,...", help="float32, bfloat16.")] = "float32,bfloat16",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which everybody runs once.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Log-probs at GPT-OSS's vocabulary, forward and backward, beside the whole of it at once; 12 GiB of memory."""
    from keel.bench.logprobs import measure_logprobs

    tell(measure_logprobs([name.strip() for name in types.split(",")], rounds=rounds), json_file)


@app.command()
def engine(
    cases: Annotated[
        str, typer.Option(metavar="CASE,...", help="equal (lengths), ragged (and stops).")
    ] = "equal,ragged",
    peers: Annotated[str, typer.Option(metavar="PEER,...", help="transformers, vllm.")] = "transformers,vllm",
    threads: Annotated[
        str, typer.Option(metavar="N,...", help="CPU threads to try; each side runs at its best.")
    ] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, after one that does not.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """The embedded engine beside transformers generate and vLLM: tokens a second, with log-probs."""
    from keel.bench.engine import NOTES, measure_engine
    from keel.bench.measure import BenchResult, command_line, machine

    facts = machine()
    counts = [int(count) for count in threads.split(",") if count.strip().isdigit()]
    names = [[name.strip() for name in given.split(",")] for given in (cases, peers)]
    rows = measure_engine(names[0], names[1], threads=counts, rounds=rounds)
    tell(BenchResult("engine", command_line(), facts, rows, NOTES), json_file)


def _show(results: list[RouteTime]) -> None:
    table = Table(box=None)
    for heading in ("route", "MiB", "ms (median)", "ms (worst)", "MiB/s"):
        table.add_column(Text(heading), justify="left" if heading == "route" else "right")
    for each in results:
        rate = "-" if each.mib_per_s is None else f"{each.mib_per_s:,.0f}"
        cells = (each.route, f"{each.num_bytes / 2**20:.0f}", f"{1e3 * each.median_s:,.1f}")
        table.add_row(*map(Text, (*cells, f"{1e3 * max(each.seconds):,.1f}", rate)))
    Console().print(table)


def tell(result: BenchResult, json_file: Path | None) -> None:
    """What every command that compares ends with: a table of the rows, the notes, and the file if one was asked for.

    The columns are the keys that any row has, in the order in which they first come.
    """
    table = Table(box=None)
    names = list(dict.fromkeys(name for row in result.rows for name in row))
    words = {name for name in names if any(isinstance(row.get(name), str) for row in result.rows)}
    for name in names:
        table.add_column(Text(name), justify="left" if name in words else "right")
    for row in result.rows:
        table.add_row(*(Text(_cell(row.get(name))) for name in names))
    console = Console()
    console.print(table)
    for note in result.notes:
        console.print(Text(note))
    if json_file is not None:
        result.write(json_file)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
