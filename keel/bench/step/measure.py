"""The comparison: equality first, then both sides alternately, each in its process; and where Keel's own time goes."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from keel.bench.measure import BenchError, Times, alternately
from keel.bench.step.keel_side import profile_keel, run_keel
from keel.bench.step.side import Report, Side
from keel.bench.step.work import WORKS, Work, build
from keel.monitor.environment import package_version

MIB = 2**20
PARTS = ("step", "generate", "score", "update")
NOTES = (
    "GPT-OSS shape, 4.0 M parameters, float32, CPU; 8 prompts of 64 tokens x 8 attempts, one AdamW step.",
    "The model's own weights force the lengths. TRL runs with transformers' generate, no gradient checkpointing.",
    "others_share: what other processes had of all cores, at most; rounds with more than 5 % are taken anew, once.",
    "equal_to is the distance of the two gradients of the same episodes, by their norm.",
    "ours_mib and peer_mib: resident memory at its peak above that of the process with everything imported.",
    "Keel's step has its recompute check (a second forward pass) in it unless recompute_every is 0, and its records.",
)
PROFILE_NOTES = ("Each operator's own time, over all threads that call it; profiling adds to all of it.",)
DISTURBED = 0.05
CASES: Mapping[str, Work] = dict(zip(("64", "256", "tool"), WORKS, strict=True))


def measure_steps(
    cases: Sequence[str], *, rounds: int, threads: int, trl_rows: int, trl_experts: str
) -> list[dict[str, Any]]:
    """Rows of each of `cases`: Keel as it comes, and without its recompute check, beside TRL.

    TRL runs `trl_rows` sequences through the model at once, with transformers' `trl_experts`. Raises BenchError for an
    unknown case, without TRL, and where the two do not do the same.
    """
    if unknown := [case for case in cases if case not in CASES]:
        raise BenchError(f"bench step: cases are {', '.join(CASES)}; got {unknown[0]!r}")
    if package_version("trl") is None:
        raise BenchError("bench step: TRL, which is compared with, is not installed: pip install 'keel-rl[trl]'")
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="keel-bench-") as scratch:
            build(CASES[case], Path(scratch) / "model")
            rows += _compared(CASES[case], Path(scratch), rounds, threads, trl_rows, trl_experts)
    return rows


def profile_steps(cases: Sequence[str], *, threads: int) -> list[dict[str, Any]]:
    """Rows of what takes longest in a step of Keel's, by torch operator."""
    rows = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="keel-bench-") as scratch:
            work, model = CASES[case], Path(scratch) / "model"
            build(work, model)
            with Side(profile_keel, work=work, model=str(model), run_dir=f"{scratch}/run", threads=threads) as side:
                rows += [{"case": work.name, **row} for row in side.ready["operators"]]
    return rows


def _compared(
    work: Work, scratch: Path, rounds: int, threads: int, trl_rows: int, trl_experts: str
) -> list[dict[str, Any]]:
    from keel.bench.step.equal import compare
    from keel.bench.step.trl_side import run_trl

    given = {"work": work, "model": str(scratch / "model"), "threads": threads}
    with Side(compare, scratch=str(scratch / "equal"), **given) as equal:
        apart, tokens = equal.ready["apart"], equal.ready["tokens"]
    with ExitStack() as stack:
        sides = {
            "keel": Side(run_keel, run_dir=str(scratch / "keel"), check=True, **given),
            "keel, recompute_every = 0": Side(run_keel, run_dir=str(scratch / "unchecked"), check=False, **given),
            "TRL": Side(run_trl, output=str(scratch / "trl"), rows=trl_rows, experts=trl_experts, **given),
        }
        for side in sides.values():
            stack.enter_context(side)
        reports = _least_disturbed(sides, rounds)
    _require_same_work(work, reports)
    return [row for name in ("keel", "keel, recompute_every = 0") for row in _rows(work, name, reports, apart, tokens)]


def _least_disturbed(sides: Mapping[str, Side], rounds: int) -> dict[str, list[Report]]:
    """The reports of `rounds` rounds in which others had at most `DISTURBED` of the machine, in every side's step.

    If there are not as many among twice the number, those with least disturbance: chosen by what others took, never by
    what was measured.
    """
    alternately({name: side.step for name, side in sides.items()}, rounds=rounds)
    for _ in range(rounds):
        if len([share for share in _shares(sides) if share <= DISTURBED]) >= rounds:
            break
        alternately({name: side.step for name, side in sides.items()}, rounds=1, warmups=0)
    shares = _shares(sides)
    chosen = sorted(sorted(range(len(shares)), key=shares.__getitem__)[:rounds])
    return {name: [side.reports[1:][index] for index in chosen] for name, side in sides.items()}


def _shares(sides: Mapping[str, Side]) -> list[float]:
    """Of each round but the first, which does not count, the largest share that others had in a step."""
    each = [[report["others_share"] for report in side.reports[1:]] for side in sides.values()]
    return [max(together) for together in zip(*each, strict=True)]


def _require_same_work(work: Work, reports: Mapping[str, Sequence[Report]]) -> None:
    """Every step of every side drew as many tokens, and took one optimizer step. Raises BenchError otherwise."""
    for name, each in reports.items():
        for report in each:
            did = (report["loss_tokens"], report["updates"])
            if did != (work.drawn_tokens, 1):
                raise BenchError(
                    f"{work.name}: {name} learned from {did[0]:.0f} tokens in {did[1]:.0f} updates, not from "
                    f"{work.drawn_tokens} in 1"
                )


def _rows(
    work: Work, ours: str, reports: Mapping[str, Sequence[Report]], apart: float, tokens: int
) -> list[dict[str, Any]]:
    """One row for the step, with memory and equality, and one for each part of it."""
    rows = []
    for part in PARTS:
        times = Times({name: tuple(report[f"{part}_s"] for report in reports[name]) for name in (ours, "TRL")})
        ratio = times.ratio("TRL", ours)
        row: dict[str, Any] = {
            "case": work.name,
            "part": part,
            "ours": ours,
            "peer": "TRL",
            "ours_ms": round(1e3 * times.median(ours), 1),
            "peer_ms": round(1e3 * times.median("TRL"), 1),
            "ratio": round(ratio.median, 3),
            "low": round(ratio.low, 3),
            "high": round(ratio.high, 3),
        }
        if part == "step":
            row |= {f"{key}_mib": _peak_mib(reports[name]) for key, name in (("ours", ours), ("peer", "TRL"))}
            row |= {"equal_to": float(f"{apart:.2g}"), "tokens": tokens}
            row["others_share"] = round(max(report["others_share"] for name in reports for report in reports[name]), 3)
            row["ours_tokens_per_s"] = round(tokens / statistics.median(times.seconds[ours]))
        rows.append(row)
    return rows


def _peak_mib(reports: Sequence[Report]) -> int:
    return round(max(int(report["extra_bytes"]) for report in reports) / MIB)
