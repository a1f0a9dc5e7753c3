"""The gap between a real vLLM and the learner over a whole run, from the run's own record.

    keel train examples/vllm.toml --set run_dir=RUN
    python -m benchmarks.vllm float32=RUN [bfloat16=RUN ...] > benchmarks/results/vllm.json

The median over steps of the mean absolute difference is what docs/vllm.md quotes. An outlier is a token that differs by
more than 1e-4. `settings` is in what the run's config differs from the example's, paths left out.
"""

from __future__ import annotations

import json
import statistics
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keel import config_load

EXAMPLE = Path(__file__).parents[1] / "examples" / "vllm.toml"

FIGURES = (
    "abs_mean",
    "abs_max",
    "abs_p99",
    "k3",
    "outliers",
    "outlier_share",
    "outliers_near_tie",
    "near_tie_share",
    "ess",
)
TIMES = ("time/rollout_s", "time/learn_s", "time/publish_s", "time/step_s", "rollout/tokens_per_s")


def measure(run: Path) -> dict[str, Any]:
    """The figures of the run in `run`: over its steps, at its evaluations, and of the machine it ran on."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["kind"] == "step" and row["stage"] == "reinforcement"]
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    return {
        "settings": settings_of(run),
        "steps": len(steps),
        "drawn_tokens": sum(row["rollout/tokens"] for row in steps),
        "failed_episodes": sum(row["rollout/failed"] for row in steps),
        "median": {name: median(steps, f"mismatch/{name}") for name in FIGURES if f"mismatch/{name}" in steps[0]},
        "worst": {name: max(row[f"mismatch/{name}"] for row in steps) for name in ("abs_mean", "abs_max", "outliers")},
        "abs_mean_by_step": [row["mismatch/abs_mean"] for row in steps],
        "entropy": {"first": steps[0]["policy/entropy"], "last": steps[-1]["policy/entropy"]},
        "weight_checks": {
            "number": sum("sync/check_abs_median" in row for row in steps),
            "worst_abs_median": max(row.get("sync/check_abs_median", 0.0) for row in steps),
        },
        "seconds": {name: median(steps, name) for name in TIMES},
        "success": {row["name"]: row.get("eval/success") for row in rows if row["kind"] == "eval"},
        "machine": {name: environment[name] for name in ("cpu", "cpu_count", "memory_bytes", "threads", "packages")},
        "vllm": version_in(run / "vllm.log"),
        "seconds_by_stage": json.loads((run / "summary.json").read_text(encoding="utf-8"))["seconds"],
    }


def settings_of(run: Path) -> dict[str, Any]:
    """Options of the run that the example has otherwise, by name."""
    example = dict(options(tomllib.loads(config_load.dump(config_load.load(EXAMPLE)))))
    own = dict(options(tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))))
    differ = {name: value for name, value in own.items() if example.get(name) != value and name != "run_dir"}
    return {name: "the weights of another run" if name == "model.path" else value for name, value in differ.items()}


def options(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values."""
    for name, value in section.items():
        if isinstance(value, dict):
            yield from options(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def median(rows: list[dict[str, Any]], name: str) -> float:
    """The median of a metric over the rows that have it."""
    return float(statistics.median(row[name] for row in rows if row.get(name) is not None))


def version_in(log: Path) -> str:
    """vLLM's version, as its server printed it."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if "LLM engine (v" in line:
            return line.partition("LLM engine (v")[2].partition(")")[0]
    return "unknown"


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    measured = {name: measure(Path(run)) for name, run in given.items()}
    command = "keel train examples/vllm.toml; python -m benchmarks.vllm " + " ".join(f"{name}=RUN" for name in given)
    json.dump({"command": command, **measured}, sys.stdout, indent=1)
    sys.stdout.write("\n")
