"""Does preflight name what is wrong? Faults at random strengths are planted in a stack, and its result is compared.

    python -m benchmarks.preflight --first-seed 1000 --pairs 12 --rounded 12 --out benchmarks/results/preflight.json
    python -m benchmarks.preflight --first-seed 1000 --engine vllm --cause healthy --out vllm.json

A case is a model family, a type, a side and one or two causes at strengths drawn from its seed; `--singles` is how many
per cause and side in float32, `--rounded` how many causes are tried in bfloat16. Every case runs `keel.preflight` on a
run's config with `engine.distortions` or `learner.distortions`, as a user would. Healthy stacks of all families and
types are cases too. In bfloat16 a case counts if its gap is more than 3 times the noise that preflight measured; the
others are listed, not counted.

Found means: of one cause, that it is named; of a pair, that both are among the first three. Precision is over all
causes that are named. Rows are written as they come, so that a campaign that is stopped is a shorter one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import keel
from keel.causes import CAUSES, Side
from keel.distortion import Distortion, applies, random_distortions
from keel.models.info import ModelInfo, model_info
from keel.models.tiny import tiny_config
from keel.preflights.result import PreflightResult
from keel.preflights.runner import versions
from keel.types import SamplingSettings

PRESETS = ("gpt_oss", "qwen3", "qwen3_moe")
DTYPES = ("float32", "bfloat16")
SIDES: tuple[Side, ...] = ("engine", "learner")
SAMPLINGS = (SamplingSettings(), SamplingSettings(0.7), SamplingSettings(0.8, 0.9), SamplingSettings(0.9, 0.95, 40))
RUNS_IN_VLLM: dict[str, dict[str, int]] = {
    "gpt_oss": {"intermediate_size": 96},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"hidden_size": 96, "moe_intermediate_size": 64, "head_dim": 32},
}
"""What vLLM's CPU kernels need of a tiny model: experts in multiples of 32, heads of 32, 64, ..."""
BOUNDED_TOP_K = 40
"""With vLLM, of a nucleus: its support is told by a bounded number of most likely tokens."""
NOT_BEFORE_A_RUN = {"learner": ("stale_version", "stale_tensor_group")}
"""A learner is only ever late with its own updates, and before a run there is none."""
COUNTS_FROM = 3.0
TOP = 3


@dataclass(frozen=True)
class Case:
    """What is planted (nothing: a healthy stack) and where."""

    seed: int
    preset: str
    dtype: str
    side: Side
    sampling: SamplingSettings
    planted: tuple[Distortion, ...]


def cases(first_seed: int, num_singles: int, num_pairs: int, num_rounded: int) -> list[Case]:
    """Every cause on either side `num_singles` times in float32, healthy stacks, `num_pairs` pairs, and `num_rounded`
    causes in bfloat16; model families are drawn. In this order, causes by turns on either side, so that a campaign that
    is stopped has seen some of everything."""
    seeds = iter(range(first_seed, first_seed + 1_000_000))
    rng = random.Random(first_seed)
    found: list[Case] = []
    for number in range(2 * num_singles):
        drawn = [_drawn(next(seeds), "float32", SIDES[(number + place) % 2], cause) for place, cause in _shuffled(rng)]
        found += [case for some in drawn for case in some]
        if number == 0:
            for preset in PRESETS:
                found += [Case(next(seeds), preset, dtype, "engine", rng.choice(SAMPLINGS), ()) for dtype in DTYPES]
            for _ in range(num_pairs):
                preset, side = rng.choice(PRESETS), rng.choice(SIDES)
                found += _pair(next(seeds), preset, "float32", side, _info(preset))
    for _, cause in _shuffled(rng)[:num_rounded]:
        found += _drawn(next(seeds), "bfloat16", rng.choice(SIDES), cause)
    return found


def _shuffled(rng: random.Random) -> list[tuple[int, str]]:
    numbered = list(enumerate(CAUSES))
    return rng.sample(numbered, len(numbered))


def _drawn(seed: int, dtype: str, side: Side, cause: str) -> list[Case]:
    """The cause planted in a family that has a place for it; empty if none has."""
    found = [case for preset in PRESETS for case in _single(seed, preset, dtype, side, cause, _info(preset))]
    return [random.Random(seed).choice(found)] if found else []


def _info(preset: str) -> ModelInfo:
    return model_info(tiny_config(preset, vocab_size=400))  # type: ignore[arg-type]


def _single(seed: int, preset: str, dtype: str, side: Side, cause: str, info: ModelInfo) -> Iterator[Case]:
    rng = random.Random(seed)
    fitting = [each for each in SAMPLINGS if applies(cause, side, info, each)]
    if fitting and cause not in NOT_BEFORE_A_RUN.get(side, ()):
        sampling = rng.choice(fitting)
        planted = random_distortions(rng, 1, side, info, sampling, among=[cause])
        yield Case(seed, preset, dtype, side, sampling, tuple(planted))


def _pair(seed: int, preset: str, dtype: str, side: Side, info: ModelInfo) -> Iterator[Case]:
    rng = random.Random(seed)
    sampling = rng.choice(SAMPLINGS)
    among = [cause for cause in CAUSES if cause not in NOT_BEFORE_A_RUN.get(side, ())]
    yield Case(
        seed, preset, dtype, side, sampling, tuple(random_distortions(rng, 2, side, info, sampling, among=among))
    )


def config_of(case: Case, engine: str) -> dict[str, Any]:
    """A run's config with the case's faults in it."""
    planted = [each.to_json() for each in case.planted]
    in_vllm = engine == "vllm"
    tiny = {"preset": case.preset, "vocab_size": 400, "options": RUNS_IN_VLLM[case.preset] if in_vllm else {}}
    top_k = case.sampling.top_k or (BOUNDED_TOP_K if in_vllm and case.sampling.top_p < 1 else 0)
    return {
        "name": "preflight campaign",
        "model": {"dtype": case.dtype, "tiny": tiny},
        "env": {"id": "CalculatorEnv"},
        "rollout": {
            "temperature": case.sampling.temperature,
            "top_p": case.sampling.top_p,
            "top_k": top_k,
            "max_sequence_tokens": 320,
        },
        "engine": {"id": engine, "distortions": planted if case.side == "engine" else []}
        | ({"vllm": {"kv_cache_gib": 0.25}} if in_vllm else {"process": "same"}),
        "learner": {"distortions": planted if case.side == "learner" else []},
    }


def row_of(case: Case, engine: str, budget_s: float) -> dict[str, Any]:
    """Run the case; what was planted, what was named, and how long it took."""
    row: dict[str, Any] = {
        "seed": case.seed,
        "preset": case.preset,
        "dtype": case.dtype,
        "engine": engine,
        "side": case.side if case.planted else "",
        "sampling": [case.sampling.temperature, case.sampling.top_p, case.sampling.top_k],
        "planted": [each.to_json() for each in case.planted],
    }
    began, processor = time.perf_counter(), time.process_time()
    try:
        result = keel.preflight(config_of(case, engine), seed=case.seed, budget_s=budget_s)
    except Exception as error:  # noqa: BLE001 (a case that cannot be run is a row that says so)
        traceback.print_exc(file=sys.stderr)
        return row | {"error": f"{type(error).__name__}: {error}", "wall_s": round(time.perf_counter() - began, 2)}
    took = {"wall_s": round(time.perf_counter() - began, 2), "cpu_s": round(time.process_time() - processor, 2)}
    return row | _judged(case, result) | took


def _judged(case: Case, result: PreflightResult) -> dict[str, Any]:
    planted = {each.cause for each in case.planted}
    named = list(dict.fromkeys(result.causes))
    gap, noise = result.gap.get("abs_mean", 0.0), result.noise or 0.0
    visible = {"lost_stop_token", "stale_version", "stale_tensor_group"} & planted
    counts = case.dtype == "float32" or not planted or gap > COUNTS_FROM * noise or bool(visible)
    return {
        "named": named,
        "found": planted <= set(named[:TOP] if len(planted) > 1 else named),
        "wrong": [cause for cause in named if cause not in planted],
        "right_side": all(each.side == case.side for each in result.attribution if each.cause in planted),
        "counts": counts,
        "gap": gap,
        "noise": noise,
        "verdict": result.verdict,
        "failed": [each.id for each in result.checks if each.status == "fail"],
        "attribution": [
            [each.cause, each.side, round(each.explained, 4), each.strength, each.group] for each in result.attribution
        ],
        "duration_s": round(result.duration_s, 2),
    }


def summary_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Recall, precision and false alarms over the rows that count."""
    ran = [row for row in rows if "error" not in row]
    counted = [row for row in ran if row["counts"] and row["planted"]]
    found: dict[str, Any] = {}
    for name, size in (("singles", 1), ("pairs", 2)):
        some = [row for row in counted if len(row["planted"]) == size]
        named = sum(len(row["named"]) for row in some)
        wrong = sum(len(row["wrong"]) for row in some)
        found[name] = {
            "cases": len(some),
            "recall": round(sum(row["found"] for row in some) / max(1, len(some)), 4),
            "precision": round(1.0 - wrong / max(1, named), 4),
            "right_side": round(sum(row["right_side"] for row in some) / max(1, len(some)), 4),
        }
    by_cause = {}
    for cause in CAUSES:
        some = [row for row in counted if [each["cause"] for each in row["planted"]] == [cause]]
        if some:
            missed = [row["named"] for row in some if not row["found"]]
            by_cause[cause] = {"cases": len(some), "found": len(some) - len(missed), "named_instead": missed}
    healthy = [row for row in ran if not row["planted"]]
    durations = sorted(row["wall_s"] for row in ran)
    processor = sorted(row["cpu_s"] for row in ran)
    return found | {
        "by_cause": by_cause,
        "misses": [_told_of(row) for row in counted if not row["found"]],
        "named_besides": [_told_of(row) for row in counted if row["wrong"]],
        "healthy": {
            "cases": len(healthy),
            "alarms": [_told_of(row) for row in healthy if row["named"] or row["failed"]],
        },
        "not_counted": sum(not row["counts"] for row in ran),
        "errors": len(rows) - len(ran),
        "wall_s": {"median": durations[len(durations) // 2], "max": durations[-1]} if durations else {},
        "cpu_s": {"median": processor[len(processor) // 2], "max": processor[-1]} if processor else {},
    }


def _told_of(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("seed", "preset", "dtype", "side", "named", "failed")} | {
        "planted": [each["cause"] for each in row["planted"]]
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-seed", type=int, required=True, help="below 1000: for building; from 1000: to report")
    parser.add_argument("--singles", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--rounded", type=int, default=12, help="causes tried in bfloat16")
    parser.add_argument("--engine", default="embedded", choices=("embedded", "vllm"))
    parser.add_argument("--preset", default="", choices=("", *PRESETS))
    parser.add_argument("--dtype", default="", choices=("", *DTYPES))
    parser.add_argument("--cause", default="", help="only cases with this cause, or 'healthy'")
    parser.add_argument("--most", type=int, default=0, help="stop after so many cases")
    parser.add_argument("--stop-after-s", type=float, default=0.0, help="begin no case after so many seconds")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--budget-s", type=float, default=150.0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    planned = cases(options.first_seed, options.singles, options.pairs, options.rounded)
    wanted = [case for case in planned if _is_wanted(case, options)]
    rows: list[dict[str, Any]] = []
    for row in _rows(wanted[: options.most or None], options):
        rows.append(row)
        sys.stdout.write(_told(rows[-1]) + "\n")
        sys.stdout.flush()
        _write(options.out, rows, len(wanted))
    sys.stdout.write(json.dumps(summary_of(rows), indent=1) + "\n")


def _rows(wanted: Sequence[Case], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows as they are done, `--jobs` at a time; no case begins after `--stop-after-s`."""
    began, waiting = time.monotonic(), iter(wanted)
    running: set[Future[dict[str, Any]]] = set()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        while True:
            while len(running) < options.jobs:
                late = options.stop_after_s and time.monotonic() - began > options.stop_after_s
                case = None if late else next(waiting, None)
                if case is None:
                    break
                running.add(pool.submit(row_of, case, options.engine, options.budget_s))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (each.result() for each in done)


def _is_wanted(case: Case, options: argparse.Namespace) -> bool:
    causes = [each.cause for each in case.planted] or ["healthy"]
    return all(
        (
            not options.preset or case.preset == options.preset,
            not options.dtype or case.dtype == options.dtype,
            not options.cause or options.cause in causes,
        )
    )


def _told(row: dict[str, Any]) -> str:
    planted = ", ".join(str(replace(Distortion(**each), seed=0)) for each in row["planted"]) or "healthy"
    verdict = row.get("error") or f"{'found' if row['found'] else 'MISSED'} {row['attribution']} gap {row['gap']:.2g}"
    where = f"{row['seed']} {row['preset']} {row['dtype']} {row['side']} {row['sampling']}"
    return f"{where}: {planted}: {verdict} {row['wall_s']} s"


def _write(path: Path, rows: Sequence[dict[str, Any]], num_planned: int) -> None:
    report = {
        "command": " ".join([Path(sys.executable).name, "-m", "benchmarks.preflight", *sys.argv[1:]]),
        "machine": {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
        "versions": versions(),
        "planned": num_planned,
        "summary": summary_of(rows),
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
