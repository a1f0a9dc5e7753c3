"""Where two runs part: the first row whose numbers differ, and the first token of their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from keel.report.episodes import RecordedStep, read_step
from keel.report.plain import cut, number
from keel.report.source import REINFORCEMENT, config_of
from keel.report.tokens import TokenText, find_token_text
from keel.runs import Run

Json = dict[str, Any]
Row = Mapping[str, Any]
MAX_STEPS = 50
"""Recorded steps that are searched for the first token that differs, from the first row that differs on."""
_HEAD = {"schema_version", "kind", "stage", "step", "train_step", "unix_s", "not_finite"}
_CLOCKS = {"rollout/tokens_per_s", "rollout/generate_s", "rollout/env_s"}


def first_row_that_differs(first: Sequence[Row], second: Sequence[Row]) -> tuple[Json | None, int]:
    """The first step, in the first run's order, whose numbers differ, and how many steps were compared until then.

    Only steps that both runs have are compared, and of those only what both measured, times and memory left out.
    Numbers are compared exactly: equal means equal to the bit.
    """
    others = {(row["stage"], row["step"]): row for row in second}
    compared = 0
    for row in first:
        other = others.get((row["stage"], row["step"]))
        if other is None:
            continue
        compared += 1
        metrics = [
            {"metric": cut(name, 80), "a": number(row[name], 17), "b": number(other[name], 17)}
            for name in row
            if name in other and not _of_the_machine(name) and row[name] != other[name]
        ]
        if metrics:
            head = {name: row[name] for name in ("stage", "step", "train_step")}
            return head | {"metrics": metrics[:40]}, compared
    return None, compared


def first_token_that_differs(first: Run, second: Run, *, since: Mapping[str, Any] | None) -> Json | None:
    """The first differing token in the records of steps that both runs have, or None if none is found.

    `since` is what `first_row_that_differs` found: equal rows before it mean equal tokens, so the search begins there,
    and if there is none (None) there is nothing to find.
    """
    if since is None:
        return None
    start = since["step"] if since["stage"] == REINFORCEMENT else 0
    common = [step for step in first.steps if step in set(second.steps) and step >= start]
    for step in common[:MAX_STEPS]:
        one, other = read_step(first, step), read_step(second, step)
        if one is not None and other is not None and (found := _in_step(one, other)) is not None:
            return found | _spelled(found, first, second)
    return None


def _in_step(first: RecordedStep, second: RecordedStep) -> Json | None:
    for index in range(max(len(first.trajectories), len(second.trajectories))):
        tokens = [_tokens(step, index) for step in (first, second)]
        position = _first_difference(*tokens)
        if position is None:
            continue
        holder = first if index < len(first.trajectories) else second
        return {
            "step": first.number,
            "trajectory": index,
            "group": cut(str(holder.trajectories[index].group_id), 200),
            "attempt": holder.trajectories[index].attempt,
            "position": position,
            "ids": [each[position] if position < len(each) else None for each in tokens],
            "ids_before": tokens[0][max(0, position - 24) : position],
        }
    return None


def _tokens(step: RecordedStep, index: int) -> list[int]:
    views = step.sequences.get(index, [])
    return [int(token) for token in np.concatenate([view.token_ids for view in views])] if views else []


def _first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    pairs = enumerate(zip_longest(first, second))
    return next((position for position, (one, other) in pairs if one != other), None)


def _spelled(found: Json, first: Run, second: Run) -> Json:
    """Ids in words, each with its own run's tokenizer."""
    words = [_words(run) for run in (first, second)]
    ids = found.pop("ids")
    before = found.pop("ids_before")
    texts: list[Json | None] = [
        None if token is None else {"id": token, "text": None if spell is None else spell.spell(token)[0]}
        for token, spell in zip(ids, words, strict=True)
    ]
    data = None if words[0] is None else bytes.fromhex("".join(words[0].spell(token)[1] for token in before))
    return {
        "a": texts[0],
        "b": texts[1],
        "before": None if data is None else cut(data.decode("utf-8", "backslashreplace"), 400),
    }


def _words(run: Run) -> TokenText | None:
    config = config_of(run)
    return find_token_text(run, config.model.path if config is not None else "")


def _of_the_machine(name: str) -> bool:
    return name in _HEAD or name in _CLOCKS or name.startswith(("time/", "memory/", "perf/"))
