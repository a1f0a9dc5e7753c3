"""The program: the commands of the loop, and where the others are registered; how errors are told, and exit codes."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import keel
from keel import config_load
from keel.cli import bench, evaluate, export, mismatch, new, preflight, recipes, report, rollout
from keel.cli.arguments import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USAGE, ConfigFile, Sets
from keel.config_docs import as_markdown
from keel.config_plugins import plugin_modules
from keel.monitor.exhausted import is_out_of_memory
from keel.monitor.interrupts import RunInterruptedError
from keel.monitor.printable import one_line, printable
from keel.secrecy import scrubbed
from keel.types import Fault

if TYPE_CHECKING:
    from keel.monitor.summary import RunSummary

ONLY_READ = ("report", "compare", "tiny-model", "new", "recipes", "export", "mismatch")
DEBUG_VARIABLE = "KEEL_DEBUG"
EXIT_CODES = f"""\b
Exit codes:
  0    done
  1    something gave way while it ran: memory, the disk, every episode, a process; or a fault of Keel's
  2    the config, an argument, or what they name has to be mended
  3    a check before the run failed
  4    the monitor stopped the run
  130  interrupted; `keel resume RUN` goes on
Set {DEBUG_VARIABLE}=1 to see where in the code an error arose.
"""

app = typer.Typer(
    epilog=EXIT_CODES,
    help="Keel: reinforcement learning for language-model agents; the policy that learns is the policy that acted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; an error whose text says everything is told without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal's encoding lacks is shown as an escape
            stream.reconfigure(errors="backslashreplace")
    try:
        app(standalone_mode=True)
    except Exception as error:  # noqa: BLE001 (the border: every error is told here, and none goes on)
        _tell(error)
        sys.exit(_exit_code(error))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(EXIT_INTERRUPTED)


def _exit_code(error: Exception) -> int:
    if isinstance(error, Fault):
        return error.exit_code
    return EXIT_USAGE if _is_not_permitted(error) else EXIT_FAILED


def _is_not_permitted(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


def _tell(error: Exception) -> None:
    """Write `error` to standard error; what it quotes of a model, a tool or a file is neither obeyed nor repeated."""
    known = isinstance(error, Fault)
    if is_out_of_memory(error) and not known:
        known = True
        text = f"out of memory: {error}; a smaller model.path, engine.slots or batch.max_tokens needs less"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        known = True
        text = f"no space left: {error}; make some, then `keel resume RUN` goes on from the last checkpoint"
    elif _is_not_permitted(error) and not known:
        known = True
        text = f"not permitted: {error}; choose another place, or mend its permissions"
    else:
        text = str(error)
    if not known or os.environ.get(DEBUG_VARIABLE):
        text = "".join(traceback.format_exception(error))
    sys.stderr.write(f"{printable(scrubbed(text.rstrip()))}\n")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(keel.__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 (its callback does it all)
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of keel itself.

    Plug-ins may lie in the directory a command is given in, which Python leaves out for installed commands. A command
    that only reads runs does without: that directory may be a stranger's.
    """
    if context.invoked_subcommand not in ONLY_READ and (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)


def train(
    config_file: ConfigFile,
    sets: Sets = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the run would take, and stop.")] = False,
) -> None:
    """Train as RUN.toml says."""
    config = config_load.load(config_file, sets or ())
    config_load.require(config, ("model.path|model.tiny.preset", "env.id"), str(config_file))
    if dry_run:
        from keel.plan import describe_plan, make_plan

        print(describe_plan(make_plan(config)))
        return
    from keel.loop import train as run

    _finish(_ended(run, config))


def resume(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the run.")]) -> None:
    """Continue a run from its newest checkpoint. Imports the modules that its config names."""
    if (run_dir / "config.toml").is_file():
        _announce_imports(run_dir / "config.toml")
    from keel.loop import resume as run

    _finish(_ended(run, run_dir))


def quickstart(
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
    run_dir: Annotated[Path | None, typer.Option(help="Run directory; without it runs/<date>-quickstart.")] = None,
    sets: Sets = None,
) -> None:
    """Build a small GPT-OSS-shaped agent, warm-start it, train it by reinforcement, and tell how well it does."""
    from keel.quickstart import run

    _finish(_ended(run, seed, run_dir, sets or ()))


def tiny_model(
    out: Annotated[Path, typer.Option(help="Directory to write; must be new or empty.")],
    preset: Annotated[str, typer.Option(help="gpt_oss, qwen3 or qwen3_moe.")] = "gpt_oss",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random weights.")] = 0,
) -> None:
    """Write a small random model and its tokenizer as an ordinary Hugging Face directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"{out} is not empty; choose another directory", param_hint="--out")
    from keel.cli.tiny import presets, write_tiny_model

    if preset not in presets():
        raise typer.BadParameter(f"got {preset!r}; known: {', '.join(presets())}", param_hint="--preset")
    write_tiny_model(preset, out, seed=seed)
    print(f"wrote {preset} to {out}")


def print_config(
    config_file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.toml]", help="Resolve this file; without it, the defaults.")
    ] = None,
    sets: Sets = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference page (docs/config.md).")] = False,
) -> None:
    """Print a complete, documented config."""
    print(as_markdown() if markdown else config_load.dump(config_load.load(config_file, sets or ())), end="")


def _announce_imports(config_file: Path) -> None:
    """Say which code outside Keel a run's config names: whoever continues another's run imports it."""
    config = config_load.parse(config_load.read_text(config_file), str(config_file), resolve_plugins=False)
    if modules := plugin_modules(config):
        print(f"importing what {one_line(str(config_file))} names: {one_line(', '.join(modules))}")


def _ended(run: Callable[..., RunSummary], *arguments: object) -> RunSummary:
    """The summary of a run, also of one that was interrupted and has saved."""
    try:
        return run(*arguments)
    except RunInterruptedError as error:
        return error.summary


def _finish(summary: RunSummary) -> None:
    """Tell how the run went and where it lies; one that the monitor stopped does not count as done."""
    print(summary)
    if (page := Path(summary.run_dir) / "report.html").is_file():
        print(f"report: {one_line(str(page))}")
    if summary.state == "stopped":
        raise typer.Exit(EXIT_STOPPED)
    if summary.state == "interrupted":
        raise typer.Exit(EXIT_INTERRUPTED)


COMMANDS: tuple[tuple[str, Callable[..., None], str], ...] = (
    ("quickstart", quickstart, "Train a small agent in a few minutes, on a CPU."),
    ("new", new.new, "Start a directory of your own: env.py, run.toml, a test."),
    ("rollout", rollout.rollout, "Play some episodes: is there a signal to learn from?"),
    ("preflight", preflight.preflight, "Are learner and engine the same policy, and if not, why?"),
    ("train", train, "Train as RUN.toml says."),
    ("resume", resume, "Continue a run from its newest checkpoint."),
    ("report", report.report, "Write or serve the report of a run."),
    ("compare", report.compare, "Say what sets two runs apart."),
    ("eval", evaluate.evaluate, "Evaluate a run, a checkpoint or any model."),
    ("mismatch", mismatch.mismatch, "Engine against learner in a log, Keel's or another trainer's."),
    ("export", export.export, "Write a run's weights as a Hugging Face directory."),
    ("recipes", recipes.recipes, "List the configs that ship with Keel."),
    ("config", print_config, "Print a complete, documented config."),
    ("tiny-model", tiny_model, "Write a small random model and its tokenizer."),
)
"""In the order of a first hour, with what `keel --help` says of each."""

for _name, _command, _short_help in COMMANDS:
    app.command(_name, short_help=_short_help)(_command)
app.add_typer(bench.app, name="bench", short_help="Measure what things take on this machine.")
