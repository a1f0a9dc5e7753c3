"""`keel mismatch LOG...`: the gap between engine and learner in a log, Keel's own or another trainer's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from keel.cli.arguments import can_be_written
from keel.monitor.printable import one_line


def mismatch(
    logs: Annotated[
        list[Path],
        typer.Argument(
            metavar="LOG...",
            help="A run, step records, token exports of prime-rl, debug dumps of slime or miles, arrays.",
        ),
    ],
    model: Annotated[
        str, typer.Option(metavar="DIR", help="Recompute the learner's side with this model where a log lacks it.")
    ] = "",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of --model.")] = "float32",
    temperature: Annotated[
        float, typer.Option(help="What --model divides logits by, where the log does not say.")
    ] = 1.0,
    tokenizer: Annotated[
        str, typer.Option(metavar="DIR", help="What spells the tokens; without it --model's, or the run's own.")
    ] = "",
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst tokens to show.")] = 20,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", callback=can_be_written, help="Also write every figure as JSON."),
    ] = None,
) -> None:
    """Tell how far apart engine and learner put the same tokens, where most, and what corrections would have done."""
    from keel.gap.measure import mismatch as run

    report = run(logs, model=model, dtype=dtype, temperature=temperature, tokenizer=tokenizer, worst=worst)
    print(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        print(f"wrote {one_line(str(json_file))}")
