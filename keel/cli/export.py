"""`keel export RUN`: a run's weights as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keel.monitor.printable import one_line


def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the run.")],
    checkpoint: Annotated[
        str | None, typer.Option(metavar="N", help="Which checkpoint, by its training steps; without it the newest.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Directory to write, which must be new; without it RUN/export/N.")
    ] = None,
    merged: Annotated[
        bool | None,
        typer.Option(
            "--merged/--adapter", help="Of a LoRA run: whole weights, or the adapter alone (as it is without)."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; without it as the run's.")] = "",
    push: Annotated[
        str, typer.Option(metavar="USER/NAME", help="Also send it to the hub; a new repository is private.")
    ] = "",
) -> None:
    """Write a run's weights as an ordinary Hugging Face directory with a model card; nothing is overwritten."""
    from keel.export import export_run

    done = export_run(run_dir, checkpoint=checkpoint, out=out, merged=merged, dtype=dtype, push=push)
    what = "merged weights" if done.kind == "merged" else done.kind
    print(f"wrote the {what} of checkpoint {one_line(done.checkpoint.name)} to {one_line(str(done.path))}")
    if done.url:
        print(f"pushed to {one_line(done.url)}")
