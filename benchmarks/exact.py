"""Exact mode on the quickstart's task: the gap of every step, and what it costs against fast mode.

    python -m benchmarks.exact --out runs/exact --json benchmarks/results/exact.json

One warm start makes an agent that calls its calculator. From its weights, for every seed and every number of tokens
per micro-batch, the same reinforcement runs once exact and once fast, one after the other, each in its turn first; so
a machine that gets busier meets both alike. A step is quicker or slower with what was drawn in it, so the slowdown is
the ratio of the two medians of seconds per drawn token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.lora import quickstart, warm_up
from keel.loop import train
from keel.runs import load_run

MODES = ("exact", "fast")
GAP = "mismatch/abs_max"


def reinforce(weights: Path, out: Path, numerics: str, seed: int, max_tokens: int, sets: list[str]) -> dict[str, Any]:
    """One run's figures: the largest gap, how many steps had one, and what a step and a drawn token took."""
    run_dir = out / f"{numerics}-{max_tokens}-{seed}"
    own = [
        f"seed={seed}",
        f"run_dir={str(run_dir)!r}",
        f"numerics={numerics}",
        'model.tiny.preset=""',
        f"model.path={str(weights)!r}",
        f"batch.max_tokens={max_tokens}",
        "warm_start.steps=0",
        "eval.num_tasks=0",
        "checkpoint.every=0",
        "report.at_end=false",
        "log.live=off",
    ]
    if not (run_dir / "summary.json").exists():
        train(quickstart([*own, *sets]))
    rows = load_run(run_dir).rows_of("step")
    spent = [row["time/step_s"] for row in rows]
    parts = sorted({name for row in rows for name in row if name.startswith("time/") and name != "time/step_s"})
    return {
        "numerics": numerics,
        "seed": seed,
        "max_tokens": max_tokens,
        "steps": len(rows),
        "steps_with_a_gap": sum(row[GAP] != 0.0 for row in rows),
        "abs_max": max(row[GAP] for row in rows),
        "ratio_max_dev": max(row["policy/ratio_max_dev"] for row in rows),
        "recompute_max_dev": max(row["policy/recompute_max_dev"] for row in rows),
        "drawn_tokens": sum(int(row["policy/loss_tokens"]) for row in rows),
        "turns_mean": round(statistics.mean(row.get("rollout/turns", 0.0) for row in rows), 3),
        "step_s_median": round(statistics.median(spent), 4),
        "ms_per_token_median": round(
            statistics.median(1e3 * row["time/step_s"] / max(1.0, row["policy/loss_tokens"]) for row in rows), 4
        ),
        "parts_s_median": {
            name.removeprefix("time/"): round(statistics.median(row.get(name, 0.0) for row in rows), 4)
            for name in parts
        },
    }


def machine() -> dict[str, Any]:
    """Where this ran."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(names),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def main() -> None:
    """Every run, then the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("gpt_oss", "qwen3", "qwen3_moe"), default="gpt_oss")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--out", type=Path, default=Path("runs/exact"))
    parser.add_argument("--json", type=Path, help="where the results go; none: only told")
    parser.add_argument("--set", dest="sets", action="append", default=[], help="an option of every run")
    parser.add_argument("--set-warm", action="append", default=[], help="an option of the warm start")
    given = parser.parse_args()
    weights = warm_up(given.preset, given.out, 0, [*given.sets, *given.set_warm])
    runs = []
    for number, (seed, size) in enumerate(itertools.product(given.seeds, given.max_tokens)):
        for mode in MODES if number % 2 == 0 else MODES[::-1]:
            runs.append(reinforce(weights, given.out, mode, seed, size, [f"steps={given.steps}", *given.sets]))
            sys.stdout.write(json.dumps(runs[-1]) + "\n")
            sys.stdout.flush()
    per_token = {
        mode: statistics.median(run["ms_per_token_median"] for run in runs if run["numerics"] == mode) for mode in MODES
    }
    result = {
        "benchmark": "exact",
        "command": "python -m benchmarks.exact " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "ms_per_token": per_token,
        "slowdown": round(per_token["exact"] / per_token["fast"], 3),
        "runs": runs,
    }
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({name: result[name] for name in ("ms_per_token", "slowdown")}) + "\n")


if __name__ == "__main__":
    main()
