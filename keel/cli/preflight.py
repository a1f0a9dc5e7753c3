"""`keel preflight RUN.toml`, or of anyone's stack: is it fit for on-policy training, and if not, why?"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from keel import config_load
from keel.causes import CAUSES
from keel.cli.arguments import EXIT_CHECK, Sets, can_be_written
from keel.monitor.printable import one_line
from keel.preflights.result import headline
from keel.report.plain import plain
from keel.types import SamplingSettings

if TYPE_CHECKING:
    from keel.preflights.result import Attribution, Check, PreflightResult

WIDTH = 120
"""Columns where the output is no terminal and COLUMNS is not set."""
STYLES = {"pass": "green", "warn": "bold yellow", "fail": "bold red", "skip": "dim"}


def preflight(  # noqa: PLR0913, PLR0917 (a command's options are its arguments)
    config_file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.toml]", help="The run's config, or a name of `keel recipes`.")
    ] = None,
    sets: Sets = None,
    model: Annotated[
        str, typer.Option(metavar="DIR_OR_ID", help="The model of a stack without a RUN.toml; needs --engine.")
    ] = "",
    engine: Annotated[str, typer.Option(metavar="URL", help="Address of the vLLM server that serves it.")] = "",
    attn: Annotated[str, typer.Option(metavar="NAME", help="Attention of the trainer, in plain transformers.")] = "",
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="float32 or bfloat16, on both sides.")] = "",
    temperature: Annotated[float | None, typer.Option(min=0.01, help="Sampling temperature; 1.0 if not given.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.01, max=1.0, help="Nucleus share; 1.0 is off.")] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="Most likely tokens kept; 0 is off.")] = None,
    allow_weight_push: Annotated[
        bool, typer.Option("--allow-weight-push", help="Push changed weights to that server, and the old ones back.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that is shipped with the model.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", callback=can_be_written, help="Write all figures.")
    ] = None,
    page_file: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", callback=can_be_written, help="Write a page with plots.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is asked and drawn.")] = 0,
) -> None:
    """Tell in minutes whether learner and engine are the same policy, and if not, why. Exits with 3 if a check fails.

    With RUN.toml: of the stack that run would have. With --model and --engine: of any vLLM server and a trainer in
    plain transformers. Nothing is pushed to a server that was not started here, unless --allow-weight-push says so.
    """
    alone = {"--model": model, "--engine": engine, "--attn": attn, "--dtype": dtype, "--temperature": temperature}
    alone |= {"--top-p": top_p, "--top-k": top_k}
    _check_usage(config_file, alone, sets)
    from keel.preflights.api import preflight as run

    if config_file is not None:
        result = run(config_load.load(config_file, sets or ()), seed=seed, tell=_tell)
    else:
        result = run(
            model=model,
            engine=engine,
            attention=attn or "eager",
            dtype=dtype or "float32",
            sampling=SamplingSettings(temperature or 1.0, top_p or 1.0, top_k or 0),
            allow_weight_push=allow_weight_push,
            trust_remote_code=trust_remote_code,
            seed=seed,
            tell=_tell,
        )
    print_result(result, _console())
    if json_file is not None:
        json_file.write_text(json.dumps(plain(result.to_json()), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if page_file is not None:
        from keel.preflights.page import write_page

        print(f"page: {one_line(str(write_page(result, page_file)))}")
    if result.verdict == "fail":
        raise typer.Exit(EXIT_CHECK)


def _check_usage(config_file: Path | None, alone: Mapping[str, object], sets: list[str] | None) -> None:
    given = [name for name, value in alone.items() if value not in ("", None)]
    if config_file is not None and given:
        raise typer.BadParameter(f"not together with RUN.toml: {', '.join(given)}; use --set SECTION.OPTION=VALUE")
    if config_file is None and not (alone["--model"] and alone["--engine"]):
        raise typer.BadParameter("give RUN.toml, or --model and --engine")
    if config_file is None and sets:
        raise typer.BadParameter("--set changes a RUN.toml, and none is given")
    dtype = alone["--dtype"]
    if dtype not in ("", "float32", "bfloat16"):
        raise typer.BadParameter(f"--dtype {dtype}: float32 or bfloat16")
    url = str(alone["--engine"])
    if url and not url.startswith(("http://", "https://")):
        raise typer.BadParameter(f"--engine {one_line(url)}: an address such as http://127.0.0.1:8000")


def _tell(what: str) -> None:
    """Say on a terminal what is being asked; nothing in a file."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[2K{one_line(what)} ...")
        sys.stderr.flush()


def _console() -> Console:
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH
    return Console(highlight=False, width=width)


def print_result(result: PreflightResult, console: Console) -> None:
    """The checks, the gap, what explains it, the verdict. Only `Text`, never a string: rich reads strings as markup."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[2K")
    console.print(Text(_headline(result), style="bold"))
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="dim")
    for name in ("", "check", "figure", "threshold", "why"):
        table.add_column(name, overflow="fold", justify="right" if name in ("figure", "threshold") else "left")
    for check in result.checks:
        table.add_row(*_row(check))
    console.print(table)
    if result.gap:
        console.print()
        console.print(Text(_gap_line(result)))
    if result.attribution:
        console.print()
        console.print(attribution_table(result.attribution))
    console.print()
    verdict = result.verdict
    told = one_line(headline(result), limit=600)
    console.print(Text(f"{verdict}: {told} ({result.duration_s:.0f} s)", style=STYLES[verdict]))


def attribution_table(attribution: tuple[Attribution, ...]) -> Table:
    """How much of the gap goes away with what, the largest share first."""
    table = Table(
        box=None, padding=(0, 2, 0, 0), header_style="dim", title="what explains the gap", title_justify="left"
    )
    for name in ("cause", "side", "explains", "gap before", "after", "what, and what to do"):
        table.add_column(
            name, overflow="fold", justify="right" if name in ("explains", "gap before", "after") else "left"
        )
    for each in attribution:
        cause = CAUSES.get(each.cause)
        where = f", layer {each.layer}" if each.layer is not None else ""
        where += f", {each.group}" if each.group else ""
        said = each.text or (cause.what if cause else "")
        advice = f"; {cause.fix}" if cause else ""
        table.add_row(
            Text(one_line(f"{cause.title if cause else each.cause}{where}")),
            Text(each.side or ""),
            Text(f"{each.explained:.0%}"),
            Text(f"{each.gap_before:.2g}"),
            Text(f"{each.gap_after:.2g}"),
            Text(one_line(said + advice, limit=400)),
        )
    return table


def _headline(result: PreflightResult) -> str:
    stack = result.stack
    named = ("model", "dtype", "engine", "trainer", "attention", "device")
    return one_line("  ".join(f"{name} {stack[name]}" for name in named if name in stack), limit=300)


def _row(check: Check) -> tuple[Text, ...]:
    why = Text(one_line(check.reason, limit=400))
    if check.fix:
        why.append(f"\nwhat to do: {one_line(check.fix, limit=300)}", style="bold")
    return (
        Text(check.status, style=STYLES[check.status]),
        Text(one_line(check.title)),
        Text(_figure(check.figure, check.unit)),
        Text(_figure(check.threshold, "")),
        why,
    )


def _figure(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.3g} {unit}".rstrip()


def _gap_line(result: PreflightResult) -> str:
    gap = result.gap
    noise = "" if result.noise is None else f"   noise {result.noise:.2g}"
    names = ("abs_mean", "abs_p50", "abs_p90", "abs_p99", "abs_max", "k1", "k3")
    figures = "   ".join(f"{name} {gap[name]:.2g}" for name in names if name in gap)
    return f"gap in nats over {int(gap.get('tokens', 0))} tokens:   {figures}{noise}"
