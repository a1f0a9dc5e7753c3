"""Everything the report shows of a run, as one JSON value. Files only: no torch, no code of the run.

`report_data` (schema_version 1) gives

    {"schema_version": 1, "live": false,
     "run": {"name", "directory", "state", "reason", "model", "env", "seed", "started_unix_s", "updated_unix_s",
             "steps_planned", "steps_done", "warm_start_steps", "keel_version", "device",
             "versions": {package: version}, "config_toml", "recorded_steps": [step, ..]},
     "verdict": {"level": "good" | "warn" | "bad" | "running", "text", "first_bad_step", "first_bad_stage",
                 "first_bad_train_step", "rules": [name, ..], "notes": [text, ..]},
     "evaluations": [{"name", "train_step", "success", "success_low", "success_high", "reward", "num_tasks",
                      "pass_at_k": {"8": {"value", "low", "high"}}}],
     "series": {"train_step": [..], "stage": [..], "step": [..], metric: [number or null, ..], ..},
     "bands": {"mismatch/abs_mean": {"healthy_max", "text"}},
     "alarms": [{"train_step", "stage", "step", "rule", "severity", "text", "first_step"}],
     "invariants": [{"name", "text", "held", "of", "ok"}],
     "time": [{"phase", "seconds"}], "worst_tokens": [see keel.report.worst],
     "episodes": {"best": "137/12", "worst": .., "strangest": .., "why": {"best": "..", ..}},
     "steps": {"137": STEP}, "sampling": text}

A `train_step` counts finished steps over all stages (1 in the first row) and is what charts are drawn over; a `step`
counts from 0 within its stage, names files and stands in links. All series have one entry per kept row. Numbers that
are not known or not finite are null; a key whose value is not known may be missing in `evaluations`, nowhere else.
`steps` holds reinforcement steps alone. What STEP and its trajectories hold is said in `keel.report.episodes`.

Texts are foreign: at most 20,000 characters (a longer one is cut and says so), otherwise as they were. They are text,
never markup.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keel.monitor import bands
from keel.report import findings, invariants, verdict
from keel.report.plain import cut, number, to_json, without_secrets
from keel.report.sampling import MAX_STEPS, Page
from keel.report.series import columns
from keel.report.source import REINFORCEMENT, alarm_rows, config_of, step_rows, whole
from keel.report.time_spent import time_spent
from keel.report.tokens import find_token_text
from keel.report.worst import worst_tokens
from keel.runs import Run, load_run

SCHEMA_VERSION = 1
DEFAULT_BUDGET = 9_500_000
"""Bytes of JSON that leave room for the chart library in a page of 15 MB."""
MAX_CONFIG = 100_000


def report_data(
    run_dir: str | Path,
    *,
    budget_bytes: int | None = DEFAULT_BUDGET,
    max_steps: int = MAX_STEPS,
    live: bool = False,
) -> dict[str, Any]:
    """What the report of the run in `run_dir` shows; see the module for its shape.

    `budget_bytes` bounds the JSON, and `max_steps` the recorded steps that are read for it: episodes are left out, and
    `sampling` says which. A budget of None leaves nothing out. Raises RunDirectoryError if `run_dir` is no run. Damage
    inside it costs what it hit and is told of in the verdict's notes.
    """
    run = load_run(run_dir)
    config = config_of(run)
    updates = config.algo.updates_per_batch if config is not None else 1
    rows, alarms = step_rows(run), alarm_rows(run)
    healthy = bands.bands(config)
    evaluations = [_evaluation(row) for row in run.evaluations]
    found = findings.find(rows, alarms, healthy, updates_per_batch=updates)
    described = _run(run, config, rows)
    ending = verdict.Ending(
        described["state"], described["reason"], described["steps_done"] or len(rows), described["steps_planned"]
    )
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "live": live,
        "run": described,
        "verdict": verdict.verdict(ending, rows, found, evaluations),
        "evaluations": evaluations,
        "series": columns(rows, always=frozenset(alarm["train_step"] for alarm in alarms)),
        "bands": {name: {"healthy_max": band.healthy_max, "text": band.text} for name, band in healthy.items()},
        "alarms": alarms,
        "invariants": [
            *invariants.from_rows(rows, healthy, updates_per_batch=updates),
            *([invariants.records_whole(run)] if run.steps else []),
        ],
        "time": time_spent(run.rows),
        "worst_tokens": worst_tokens(run),
    }
    words = find_token_text(run, config.model.path if config is not None else "")
    room = None if budget_bytes is None else max(0, budget_bytes - len(to_json(data)))
    page = Page(run, words, room, max_steps, live=live)
    data |= page.fill(rows, _troubled(alarms, found), gap_limit=100 * healthy[bands.MISMATCH].healthy_max)
    data["sampling"] = " ".join([data["sampling"], *_left_out(data, len(rows), len(run.alarms))])
    if page.checked:
        data["invariants"].append(invariants.no_failed_world_is_zero(page.checked))
    recorded = verdict.recorded_notes(run.recorded_evaluations)
    data["verdict"]["notes"] = [
        *verdict.notes(rows, found, updates_per_batch=updates, problems=run.problems),
        *map(without_secrets, recorded),
    ]
    return data


def _left_out(data: dict[str, Any], num_rows: int, num_alarms: int) -> list[str]:
    """Sentences on rows and alarms that the data does not hold."""
    said = []
    drawn = len(data["series"]["train_step"])
    if drawn < num_rows:
        said.append(f"Curves have {drawn:,} of {num_rows:,} rows: the smallest and largest of every stretch are kept.")
    if len(data["alarms"]) < num_alarms:
        said.append(f"Of {num_alarms:,} alarms the first {len(data['alarms']):,} are shown.")
    return said


def _troubled(alarms: list[dict[str, Any]], found: list[findings.Finding]) -> list[int]:
    """Reinforcement steps at which something was found or an alarm was raised, findings first."""
    steps = [finding.row["step"] for finding in found if finding.row and finding.row["stage"] == REINFORCEMENT]
    return steps + [alarm["first_step"] for alarm in alarms if alarm["stage"] == REINFORCEMENT]


def _run(run: Run, config: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    status, environment = run.status, run.environment
    done = status.get("steps_done")
    done = done if isinstance(done, Mapping) else {}
    versions = environment.get("packages")
    versions = versions if isinstance(versions, Mapping) else {}
    times = [value for row in run.rows if (value := number(row.get("unix_s"), 14)) is not None]
    return {
        "name": cut(config.name if config is not None else run.name, 200),
        "directory": cut(str(run.path.resolve()), 400),
        "state": cut(run.state, 40),
        "reason": cut(without_secrets(str(status.get("reason") or "")), 2_000),
        "model": cut(_model(config), 400),
        "env": cut(config.env.id if config is not None else "", 400),
        "seed": config.seed if config is not None else None,
        "started_unix_s": min(times, default=None),
        "updated_unix_s": number(status.get("heartbeat_unix_s"), 14) or max(times, default=None),
        "steps_planned": config.steps if config is not None else whole(status.get("steps"), 0),
        "steps_done": whole(done.get("reinforcement"), sum(row["stage"] == "reinforcement" for row in rows)),
        "warm_start_steps": whole(done.get("warm_start"), sum(row["stage"] == "warm_start" for row in rows)),
        "keel_version": _text_or_none(versions.get("keel-rl")),
        "device": _text_or_none(environment.get("device")),
        "versions": {cut(str(name), 80): _text_or_none(version) for name, version in list(versions.items())[:60]},
        "config_toml": cut(without_secrets(_config_text(run)), MAX_CONFIG),
        "recorded_steps": run.steps,
    }


def _config_text(run: Run) -> str:
    try:
        return run.config_text
    except RuntimeError:
        return ""  # told of among the run's problems, by `config_of`


def _model(config: Any) -> str:
    if config is None:
        return ""
    return config.model.path or f"tiny {config.model.tiny.preset}"


def _text_or_none(value: Any) -> str | None:
    return cut(str(value), 80) if value is not None else None


def _evaluation(row: Mapping[str, Any]) -> dict[str, Any]:
    """One evaluation; `eval/pass@8`, `eval/pass@8_low` and `_high` become `pass_at_k`."""
    kept = ("success", "success_low", "success_high", "reward", "num_tasks", "failed", "malformed", "turns", "tokens")
    found: dict[str, Any] = {"name": cut(str(row.get("name")), 80), "train_step": whole(row.get("train_step"), 0)}
    found |= {name: number(row[name], 9) for name in kept if name in row}
    powers = [match[1] for name in row if (match := re.fullmatch(r"pass@([1-9][0-9]{0,5})", name))]
    if powers:
        found["pass_at_k"] = {
            k: {
                "value": number(row.get(f"pass@{k}")),
                "low": number(row.get(f"pass@{k}_low")),
                "high": number(row.get(f"pass@{k}_high")),
            }
            for k in sorted(powers, key=int)
        }
    return found
