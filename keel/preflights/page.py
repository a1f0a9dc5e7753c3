"""A preflight as one HTML file that needs nothing else: verdict, gap, what explains it, every check with its fix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keel.causes import CAUSES
from keel.monitor.rows import write_text
from keel.preflights.result import Attribution, Check, GapSample, PreflightResult, headline
from keel.report.plain import number, plain, to_json, without_secrets
from keel.report.write import page

MAX_DRAWN = 2000
"""Points of the scatter plot; the worst tokens are always among them."""
NUM_WORST = 12
LEAST_GAP = 1e-9
"""What a gap of exactly 0 is drawn at, on a scale of powers of ten."""


def write_page(result: PreflightResult, out: str | Path) -> Path:
    """Write `result` as a page to `out`, replacing it whole; returns its path. Raises OSError if it cannot be."""
    path = Path(out)
    write_text(path, page("preflight.html", to_json(page_data(result))))
    return path


def page_data(result: PreflightResult) -> dict[str, Any]:
    """What the page's script draws, as JSON values: finite numbers or null, no secrets."""
    return {
        "schema_version": 1,
        "verdict": result.verdict,
        "headline": headline(result),
        "stack": [[without_secrets(str(name)), _shown(value)] for name, value in result.stack.items()],
        "checks": [_check(check) for check in result.checks],
        "attribution": [_attribution(each) for each in result.attribution],
        "gap": {name: number(value) for name, value in result.gap.items()},
        "noise": None if result.noise is None else number(result.noise),
        "sample": None if result.sample is None else _sample(result.sample),
        "duration_s": number(result.duration_s),
        "versions": [[str(name), _shown(value)] for name, value in result.versions.items()],
    }


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return without_secrets(", ".join(f"{name} {item}" for name, item in value.items()))
    return without_secrets(str(value))


def _check(check: Check) -> dict[str, Any]:
    return {
        "id": check.id,
        "title": check.title,
        "status": check.status,
        "reason": without_secrets(check.reason),
        "figure": _number(check.figure),
        "threshold": _number(check.threshold),
        "unit": check.unit,
        "fix": without_secrets(check.fix),
        "details": plain(dict(check.details)),
    }


def _number(value: float | None) -> float | None:
    return None if value is None else number(float(value))


def _attribution(each: Attribution) -> dict[str, Any]:
    cause = CAUSES.get(each.cause)
    return {
        "cause": each.cause,
        "title": cause.title if cause is not None else "unexplained",
        "what": cause.what if cause is not None else "what no known cause takes away",
        "fix": cause.fix if cause is not None else "",
        "side": each.side or "",
        "explained": _number(each.explained),
        "gap_before": _number(each.gap_before),
        "gap_after": _number(each.gap_after),
        "layer": each.layer,
        "strength": _number(each.strength),
        "group": each.group,
        "text": without_secrets(each.text),
    }


def _sample(sample: GapSample) -> dict[str, Any]:
    """The points to draw: the worst tokens and an even choice of the others, columns of equal length."""
    gaps = [abs(a - b) for a, b in zip(sample.engine, sample.learner, strict=True)]
    order = sorted(range(len(gaps)), key=lambda index: _rank(gaps[index]))
    chosen = sorted({*order[: MAX_DRAWN // 10], *_evenly(order, MAX_DRAWN)})
    texts = sample.text or ("",) * len(gaps)
    return {
        "engine": [number(float(sample.engine[index])) for index in chosen],
        "learner": [number(float(sample.learner[index])) for index in chosen],
        "position": [int(sample.position[index]) for index in chosen],
        "gap_log10": [_log10(gaps[index]) for index in chosen],
        "histogram": _histogram(gaps),
        "num_tokens": sample.num_tokens or len(gaps),
        "worst": [
            {
                "text": without_secrets(texts[index]),
                "sequence": int(sample.sequence[index]),
                "position": int(sample.position[index]),
                "engine": number(float(sample.engine[index])),
                "learner": number(float(sample.learner[index])),
                "gap": number(float(gaps[index])),
            }
            for index in order[:NUM_WORST]
        ],
    }


def _rank(gap: float) -> float:
    """Sorts the largest first; a gap that is no number is the worst of all."""
    return -math.inf if math.isnan(gap) else -gap


def _evenly(order: Sequence[int], count: int) -> list[int]:
    step = max(1.0, len(order) / count)
    return [order[int(index * step)] for index in range(min(count, len(order)))]


def _log10(gap: float) -> float | None:
    return number(math.log10(max(gap, LEAST_GAP))) if math.isfinite(gap) else None


def _histogram(gaps: Sequence[float]) -> dict[str, list[float]]:
    """How many tokens lie in each quarter of a power of ten, over all tokens that were measured."""
    counts: dict[int, int] = {}
    for gap in gaps:
        if math.isfinite(gap):
            bin_ = math.floor(4 * math.log10(max(gap, LEAST_GAP)))
            counts[bin_] = counts.get(bin_, 0) + 1
    bins = range(min(counts), max(counts) + 1) if counts else range(0)
    return {"center_log10": [(bin_ + 0.5) / 4 for bin_ in bins], "count": [float(counts.get(bin_, 0)) for bin_ in bins]}
