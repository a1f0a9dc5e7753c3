"""`keel report` and `keel compare`: a run directory, or two, as a page to look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keel.cli.arguments import can_be_written
from keel.monitor.printable import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="Directory of the run.")]
MAX_SHOWN = 20


def report(
    run_dir: RunDir,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=can_be_written, help="Where to write it; without it RUN/report.html."),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve it to this machine instead: every step, live while the run goes on.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve; 0: any free one.")] = 0,
) -> None:
    """Write the report of a run as one HTML file that needs nothing else."""
    if serve:
        _serve(run_dir, port)
        return
    from keel.report.write import size_of, write_report

    path = write_report(run_dir, out)
    print(f"wrote {printable(str(path))} ({size_of(path)})")


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Directory of a run.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Directory of another.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=can_be_written, help="Also write it as an HTML page.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", callback=can_be_written, help="Also write it as JSON.")
    ] = None,
) -> None:
    """Say what sets two runs apart: options, evaluations with intervals, and the first step that differs."""
    from keel.monitor.rows import write_text
    from keel.report.compare import compare_data
    from keel.report.plain import to_json
    from keel.report.write import page, size_of

    data = compare_data(first, second)
    for line in _lines(data):
        print(printable(line).replace("\n", "\\n"))
    if as_json is not None:
        write_text(as_json, json.dumps(data, indent=1) + "\n")
        print(f"wrote {printable(str(as_json))}")
    if out is not None:
        write_text(out, page("compare.html", to_json(data)))
        print(f"wrote {printable(str(out))} ({size_of(out)})")


def _serve(run_dir: Path, port: int) -> None:
    from keel.report.serve import ReportServer

    try:
        server = ReportServer(run_dir, port)
    except OSError as error:
        message = f"port {port} cannot be had ({error.strerror}); choose another, or 0 for any free one"
        raise typer.BadParameter(message, param_hint="--port") from error
    with server:
        print(f"serving {printable(str(run_dir))} at {server.address} (this machine only); Ctrl-C ends it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


def _lines(data: Mapping[str, Any]) -> list[str]:
    """A comparison as lines for the terminal."""
    lines = [f"{side}: {data[side]['directory']} ({data[side]['state']})  {data[side]['text']}" for side in "ab"]
    lines += ["", data["summary"], ""]
    options = data["config"]
    lines += [f"{option['option']}: {option['a']} | {option['b']}" for option in options[:MAX_SHOWN]]
    if len(options) > MAX_SHOWN:
        lines.append(f"... and {len(options) - MAX_SHOWN} more options")
    for row in data["evaluations"]:
        rates = " | ".join(_rate(row[side]) for side in "ab")
        lines.append(f"held-out success {row['name']}: {rates}: {row['text']}")
    lines += [f"{row['text']}: {_figure(row['a'])} | {_figure(row['b'])}" for row in data["figures"]]
    first = data["divergence"]["first"]
    if first is not None:
        lines.append(f"first step that differs: {first['stage']} {first['step']}")
        lines += [f"  {row['metric']}: {row['a']} | {row['b']}" for row in first["metrics"][:5]]
    token = data["divergence"]["token"]
    if token is not None:
        place = f"step {token['step']}, group {token['group']}, attempt {token['attempt']}, token {token['position']}"
        lines.append(f"first token that differs: {place}: {_token(token['a'])} | {_token(token['b'])}")
    return lines


def _rate(row: Mapping[str, Any] | None) -> str:
    if row is None or row.get("success") is None:
        return "-"
    low, high = row.get("success_low"), row.get("success_high")
    interval = f" ({100 * low:.1f} to {100 * high:.1f})" if low is not None and high is not None else ""
    return f"{100 * row['success']:.1f} %{interval}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _token(token: Mapping[str, Any] | None) -> str:
    return "(the sequence ends)" if token is None else f"{token['id']} {token['text']!r}"
