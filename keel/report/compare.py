"""Two runs side by side: what differs in their configs, how their evaluations compare, and where they part.

`compare_data` gives

    {"schema_version": 1,
     "a": RUN, "b": RUN,                      RUN = {"name", "directory", "state", "seed", "model", "env", "steps_done",
                                                     "steps_planned", "level", "text"}; level and text: its verdict
     "summary": text,                         one sentence
     "config": [{"option", "a", "b"}],        options that differ, as TOML values; null: one run has it not
     "evaluations": [{"name", "a": EVALUATION or null, "b": .., "difference": DIFFERENCE or null, "text"}],
                                              EVALUATION as in the report; DIFFERENCE = {"value", "low", "high",
                                              "differs"}: success of b less that of a, with its 95 % interval
     "figures": [{"metric", "text", "a", "b"}],
     "divergence": {"text", "same_seed", "same_config", "rows_compared", "first": FIRST or null,
                    "token": TOKEN or null},
     "series": {"a": SERIES, "b": SERIES}, "bands": {"a": BANDS, "b": BANDS}}     as in the report

    FIRST = {"stage", "step", "train_step", "metrics": [{"metric", "a", "b"}]}: the first step whose numbers differ, and
            which they are; times and speeds are not compared
    TOKEN = {"step", "trajectory", "group", "attempt", "position", "before", "a": {"id", "text"} or null, "b": ..}: the
            first token that differs between the two runs' records; null: one sequence ends there
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from keel.report.data import report_data
from keel.report.difference import success_difference
from keel.report.diverge import first_row_that_differs, first_token_that_differs
from keel.report.options import differing_options
from keel.report.plain import number
from keel.report.source import REINFORCEMENT, step_rows
from keel.runs import load_run

Json = dict[str, Any]
Row = Mapping[str, Any]
FIGURES = (
    ("reward/mean", "reward, last 20 steps"),
    ("success", "training success, last 20 steps"),
    ("policy/entropy", "entropy, last 20 steps"),
    ("policy/grad_norm", "gradient norm, last 20 steps"),
    ("mismatch/abs_mean", "engine-learner gap, last 20 steps"),
    ("rollout/episode_tokens", "tokens an episode, last 20 steps"),
    ("rollout/tokens_per_s", "drawn tokens a second, last 20 steps"),
    ("time/step_s", "seconds a step, last 20 steps"),
)
LATE = 20


def compare_data(first: str | Path, second: str | Path) -> Json:
    """What sets two runs apart; see the module. Raises RunDirectoryError if one of them is no run."""
    data = [report_data(path, budget_bytes=0, max_steps=0) for path in (first, second)]
    runs = [load_run(path) for path in (first, second)]
    rows = [step_rows(run) for run in runs]
    options = differing_options(*runs)
    evaluations = _evaluations(*(one["evaluations"] for one in data))
    divergence = _divergence(runs, rows, options)
    return {
        "schema_version": 1,
        "a": _run(data[0]),
        "b": _run(data[1]),
        "summary": _summary(options, evaluations, divergence),
        "config": options,
        "evaluations": evaluations,
        "figures": _figures(*rows),
        "divergence": divergence,
        "series": {name: one["series"] for name, one in zip("ab", data, strict=True)},
        "bands": {name: one["bands"] for name, one in zip("ab", data, strict=True)},
    }


def _run(data: Json) -> Json:
    names = ("name", "directory", "state", "seed", "model", "env", "steps_done", "steps_planned")
    return {name: data["run"][name] for name in names} | {name: data["verdict"][name] for name in ("level", "text")}


def _evaluations(first: Sequence[Json], second: Sequence[Json]) -> list[Json]:
    """Evaluations by name, those of the first run in its order, then what only the second has."""
    by_name = [{row["name"]: row for row in rows} for rows in (first, second)]
    found = []
    for name in dict.fromkeys([*by_name[0], *by_name[1]]):
        one, other = by_name[0].get(name), by_name[1].get(name)
        apart = success_difference(one, other) if one is not None and other is not None else None
        entry: Json = {"name": name, "a": one, "b": other, "difference": None, "text": "only one run has it"}
        if apart is not None:
            bounds = f"{100 * apart.low:+.1f} to {100 * apart.high:+.1f} points, 95 %"
            entry["difference"] = {
                "value": number(apart.value),
                "low": number(apart.low),
                "high": number(apart.high),
                "differs": apart.differs,
            }
            entry["text"] = f"differs by {100 * apart.value:+.1f} points ({bounds})"
            if not apart.differs:
                entry["text"] = f"no difference shown ({bounds})"
        elif one is not None and other is not None:
            entry["text"] = "no success rate to compare"
        found.append(entry)
    return found


def _figures(first: Sequence[Row], second: Sequence[Row]) -> list[Json]:
    found: list[Json] = []
    for metric, text in FIGURES:
        values = [_late(rows, metric) for rows in (first, second)]
        if values != [None, None]:
            found.append({"metric": metric, "text": text, "a": values[0], "b": values[1]})
    return found


def _late(rows: Sequence[Row], metric: str) -> float | int | None:
    trained = [row for row in rows if row["stage"] == REINFORCEMENT] or rows
    values = [value for row in trained[-LATE:] if (value := number(row.get(metric))) is not None]
    return number(fmean(values)) if values else None


def _divergence(runs: Sequence[Any], rows: Sequence[Sequence[Row]], options: Sequence[Json]) -> Json:
    first, compared = first_row_that_differs(*rows)
    token = first_token_that_differs(*runs, since=first)
    same_seed = "seed" not in {option["option"] for option in options}
    return {
        "text": _parted(first, token, compared, same_seed=same_seed),
        "same_seed": same_seed,
        "same_config": not options,
        "rows_compared": compared,
        "first": first,
        "token": token,
    }


def _parted(first: Json | None, token: Json | None, compared: int, *, same_seed: bool) -> str:
    if not compared:
        return "No step of one has a counterpart in the other, so where they part cannot be said."
    if first is None:
        return f"Equal in every number, to the last digit, on all {compared:,} steps that both have."
    stage = "" if first["stage"] == REINFORCEMENT else "warm-start "
    names = ", ".join(each["metric"] for each in first["metrics"][:3])
    told = f"Equal up to {stage}step {first['step']:,}, where the first numbers differ: {names}."
    if first["train_step"] == 1:
        told = f"Different from the first step on: {names}."
        told += "" if same_seed else " Their seeds differ, so nothing else was to be expected."
    if token is not None:
        told += (
            f" The first token that differs is number {token['position']:,} of attempt {token['attempt']} in group "
            f"{token['group']}, step {token['step']:,}."
        )
    return told


def _summary(options: Sequence[Json], evaluations: Sequence[Json], divergence: Json) -> str:
    names = [option["option"] for option in options]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    told = [f"The configs differ in {shown}." if names else "The configs are the same."]
    final = next((each for each in reversed(evaluations) if each["difference"] is not None), None)
    if final is not None:
        rates = " against ".join(f"{100 * final[side]['success']:.1f} %" for side in "ab")
        told.append(f"Held-out success {final['name']}: {rates}, {final['text']}.")
    return " ".join([*told, divergence["text"]])
