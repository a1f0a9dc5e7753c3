"""The gap between a real vLLM and the learner over a whole run, from the run's own record.

    keel train examples/vllm.toml --set run_dir=RUN
    python -m benchmarks.vllm float32=RUN [bfloat16=RUN ...] > benchmarks/results/vllm.json

The median over steps of the mean absolute difference is what docs/vllm.md quotes. An outlier is a token that differs by
more than 1e-4.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

FIGURES = ("abs_mean", "abs_max", "abs_p99", "k3", "outliers", "outlier_share", "ess")
TIMES = ("time/rollout_s", "time/learn_s", "time/publish_s", "time/step_s", "rollout/tokens_per_s")


def measure(run: Path) -> dict[str, Any]:
    """The figures of the run in `run`: over its steps, at its evaluations, and of the machine it ran on."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["kind"] == "step" and row["stage"] == "reinforcement"]
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    return {
        "steps": len(steps),
        "drawn_tokens": sum(row["rollout/tokens"] for row in steps),
        "failed_episodes": sum(row["rollout/failed"] for row in steps),
        "median": {name: median(steps, f"mismatch/{name}") for name in FIGURES},
        "worst": {name: max(row[f"mismatch/{name}"] for row in steps) for name in ("abs_mean", "abs_max", "outliers")},
        "abs_mean_by_step": [row["mismatch/abs_mean"] for row in steps],
        "seconds": {name: median(steps, name) for name in TIMES},
        "success": {row["name"]: row.get("eval/success") for row in rows if row["kind"] == "eval"},
        "machine": {name: environment[name] for name in ("cpu", "cpu_count", "memory_bytes", "threads", "packages")},
        "vllm": version_in(run / "vllm.log"),
        "seconds_by_stage": json.loads((run / "summary.json").read_text(encoding="utf-8"))["seconds"],
    }


def median(rows: list[dict[str, Any]], name: str) -> float:
    """The median of a metric over the rows that have it."""
    return statistics.median(row[name] for row in rows if row.get(name) is not None)


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
