"""docs/benchmarks.md from the committed figures: `python scripts/benchmarks_page.py` writes it, a test compares.

Every file of benchmarks/results in the shape of `keel.bench.measure.BenchResult` gets a section. Nothing on the page is
written by hand but what is below.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
SHAPE = {"benchmark", "command", "machine", "rows", "notes"}

INTRODUCTION = """\
<!-- Written by scripts/benchmarks_page.py from benchmarks/results/*.json; change those, not this. -->

# Benchmarks

What is compared runs alternately in one run on one machine, and the results are compared first: programs that do not
agree are not timed. `ours` and `peer` are medians over the rounds; `ratio` is the median of the rounds' own ratios,
peer by ours (above 1, Keel is faster), `low` and `high` the extremes; `equal to` is how far the results were apart.
Memory is resident memory at its peak above what was resident before, unless a section says otherwise. Each section
ends with the command that measures it again.
"""
NO_GPU = "No GPU was to be had for these figures: all of them are of a CPU, and none says anything about a GPU.\n"
OTHERS = """\
## Other figures

Of whole runs rather than of programs side by side; the pages that speak of them explain them:
"""
SAID_OF_PACKAGES = ("torch", "transformers", "trl", "vllm", "liger-kernel")
UNITS = {"_ms": "ms", "_s": "s", "_mib": "MiB", "_per_s": "per s"}


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    loaded = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}
    shown = {name: result for name, result in loaded.items() if isinstance(result, dict) and result.keys() >= SHAPE}
    others = [f"- [{name}](../benchmarks/results/{name})\n" for name in loaded if name not in shown]
    on_gpu = any(result["machine"].get("gpu") for result in shown.values())
    parts = [INTRODUCTION, *([] if on_gpu else [NO_GPU])]
    parts += [_section(name, result) for name, result in shown.items()]
    return "\n".join([*parts, OTHERS + "\n" + "".join(others)] if others else parts)


def _section(name: str, result: Mapping[str, Any]) -> str:
    lines = [f"## {_text(result['benchmark'])}", ""]
    lines += [f"- {_text(note)}" for note in result["notes"]]
    lines += ["", *_tables(result["rows"])]
    lines += [f"{_machine(result['machine'])}. All figures: [{name}](../benchmarks/results/{name}).", ""]
    return "\n".join([*lines, "```text", result["command"].replace("```", ""), "```", ""])


def _tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One table after the other: rows with the same keys are in the same. Words that all share are said once."""
    kinds: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(tuple(row), []).append(row)
    for names, alike in kinds.items():
        words = {name for name in names if any(isinstance(row[name], str) for row in alike)}
        shared = [name for name in names if name in words and len(alike) > 1 and len({row[name] for row in alike}) == 1]
        columns = [name for name in names if name not in shared]
        if shared:
            yield "; ".join(f"{_heading(name)}: {_text(_value(alike[0][name]))}" for name in shared) + "\n"
        yield _line(map(_heading, columns))
        yield _line("---" if name in words else "---:" for name in columns)
        for row in alike:
            yield _line(_text(_value(row[name])) for name in columns)
        yield ""


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _heading(name: str) -> str:
    """`ours_ms` as "ours (ms)"."""
    for ending in sorted(UNITS, key=len, reverse=True):
        if name.endswith(ending):
            return _text(f"{name.removesuffix(ending).replace('_', ' ')} ({UNITS[ending]})")
    return _text(name.replace("_", " "))


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value and abs(value) < 0.01:
        return f"{value:.1e}"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def _machine(facts: Mapping[str, Any]) -> str:
    """Where it was measured, on one line."""
    packages = facts.get("packages", {})
    wanted = [f"{name} {packages[name]}" for name in SAID_OF_PACKAGES if packages.get(name)]
    device = facts.get("gpu") or f"{facts.get('cpu')}, {facts.get('cpu_usable')} cores"
    load = ", ".join(f"{value:g}" for value in facts.get("load", ()))
    commit = ((facts.get("git") or {}).get("commit") or "")[:12]
    said = [f"On {device}", f"{facts.get('threads')} threads", *wanted, f"load before {load}", f"commit {commit}"]
    return _text(", ".join(said))


def _text(text: str) -> str:
    """Text of a result as text of the page: nothing in it becomes a table's edge or a tag."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
