"""`keel eval SOURCE`: how well a config's model, a run's checkpoint, or any model does on held-out tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from keel.cli.arguments import Sets, can_be_written
from keel.monitor.printable import one_line


def evaluate(  # noqa: PLR0913, PLR0917 (a command's options)
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A RUN.toml, a run's directory, or a model.")],
    model: Annotated[
        str, typer.Option(metavar="PATH", help="Other weights: a checkpoint, a Hugging Face directory or hub id.")
    ] = "",
    checkpoint: Annotated[
        str | None, typer.Option(metavar="N|latest", help="Which of a run's checkpoints; without it the newest.")
    ] = None,
    env: Annotated[str, typer.Option(metavar="MODULE:NAME", help="Another environment.")] = "",
    reward: Annotated[str, typer.Option(metavar="MODULE:NAME", help="Another reward.")] = "",
    num_tasks: Annotated[int | None, typer.Option("-n", "--num-tasks", min=1, help="Held-out tasks.")] = None,
    attempts: Annotated[int | None, typer.Option(min=1, help="Attempts per task; several give pass@k.")] = None,
    k: Annotated[str, typer.Option(metavar="1,4,8", help="The k of pass@k.")] = "",
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", callback=can_be_written, help="Write figures, config and every task's outcome."
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the trajectories, tokens included.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Put the result into the run, for its report.")] = False,
    sets: Sets = None,
) -> None:
    """Evaluate on held-out tasks: success, pass@k and reward, each with its 95 % interval."""
    from keel.evaluation import evaluate as run

    result = run(
        source,
        env=env or None,
        reward=reward or None,
        model=model or None,
        checkpoint=checkpoint,
        num_tasks=num_tasks,
        attempts=attempts,
        k=_numbers(k) if k else None,
        temperature=temperature,
        seed=seed,
        sets=sets or (),
        json_file=json_file,
        save=save,
        record=record,
    )
    print(result)
    if json_file is not None:
        print(f"wrote {one_line(str(json_file))}")
    if save is not None:
        print(f"wrote the trajectories to {one_line(str(save))}")
    if record:
        print(f"recorded in {one_line(source)}; `keel report` shows it")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"got {text!r}; give numbers: 1,4,8", param_hint="--k") from None
