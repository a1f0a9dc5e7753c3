"""The tokens of a run on which engine and learner differed most, from its rows of kind "worst_tokens".

{"step": 137, "where": "000137.001/3", "position": 67, "engine": -8.15, "learner": -8.31, "gap": -0.16,
 "text": text or null, "before": text or null}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keel.report.plain import cut, number
from keel.report.source import REINFORCEMENT, whole
from keel.runs import Run
from keel.secrecy import scrubbed

SHOWN = 12
MAX_WHERE = 200
MAX_TEXT = 80


def worst_tokens(run: Run) -> list[dict[str, Any]]:
    """The `SHOWN` largest of all steps, largest first; what a damaged row says beside numbers is left out."""
    found = []
    for row in run.rows_of("worst_tokens"):
        tokens = row.get("tokens")
        if row.get("stage") == REINFORCEMENT and isinstance(tokens, list):
            found += [_told(token, whole(row.get("step"), 0)) for token in tokens if isinstance(token, Mapping)]
    known = [token for token in found if token["gap"] is not None]
    return sorted(known, key=lambda token: -abs(token["gap"]))[:SHOWN]


def _told(token: Mapping[str, Any], step: int) -> dict[str, Any]:
    return {
        "step": step,
        "where": cut(scrubbed(str(token.get("where", ""))), MAX_WHERE),
        "position": whole(token.get("position"), 0),
        "engine": number(token.get("rollout_logprob")),
        "learner": number(token.get("learner_logprob")),
        "gap": number(token.get("gap"), 4),
        "text": _text(token.get("text"), slice(MAX_TEXT)),
        "before": _text(token.get("before"), slice(-MAX_TEXT, None)),
    }


def _text(value: Any, part: slice) -> str | None:
    """The first characters of a token, the last of what stands before it."""
    return scrubbed(value)[part] if isinstance(value, str) else None
