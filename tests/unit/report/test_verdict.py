from __future__ import annotations

import pytest

from keel.config import TrainConfig
from keel.monitor.bands import bands
from keel.report.difference import Estimate, difference
from keel.report.findings import find
from keel.report.verdict import CLIP_NOTE, LOSS_NOTE, Ending, notes, verdict

DONE = Ending("completed", "", 100, 100)
EVALS = (
    {"name": "initial", "success": 0.0, "num_tasks": 512},
    {"name": "after_warm_start", "success": 246 / 512, "num_tasks": 512},
    {"name": "final", "success": 506 / 512, "num_tasks": 512},
)


def judge(rows, ending=DONE, evaluations=EVALS):
    found = find(rows, [], bands(TrainConfig()), updates_per_batch=1)
    return verdict(ending, rows, found, evaluations)


def test_a_run_that_learned_is_told_in_one_sentence_of_figures(make_rows):
    found = judge(make_rows(100))
    assert found["level"] == "good"
    assert found["first_bad_step"] is None
    assert found["text"] == (
        "Sound and learning: held-out success 48.0 % → 98.8 % (512 tasks), ratio exactly 1 on 100 of 100 steps, "
        "engine-learner gap 2e-07 nats."
    )


def test_a_broken_run_names_its_first_bad_step(make_rows):
    rows = make_rows(100)
    for step in (37, 38, 39):
        rows[step]["policy/grad_norm"] = None
        rows[step]["not_finite"] = {"policy/grad_norm": "nan"}
    found = judge(rows)
    assert (found["level"], found["first_bad_step"], found["first_bad_train_step"]) == ("bad", 37, 38)
    assert found["text"].startswith("Broken at step 37: the gradient was not finite (3 of 100 steps).")


def test_a_bad_step_of_the_warm_start_is_told_as_such(make_rows):
    rows = make_rows(100)
    for row in rows[:50]:
        row["stage"] = "warm_start"
    rows[12]["policy/ratio_max_dev"] = 0.5
    found = judge(rows)
    assert (found["first_bad_step"], found["first_bad_stage"]) == (12, "warm_start")
    assert "Broken at warm-start step 12" in found["text"]


@pytest.mark.parametrize(
    ("state", "reason", "level", "words"),
    [
        (
            "failed",
            "RuntimeError: no more memory",
            "bad",
            "Crashed after 60 of 100 steps: RuntimeError: no more memory.",
        ),
        ("crashed", "", "bad", "Ended without a word after 60 of 100 steps"),
        ("stopped", "loss is nan", "bad", "Stopped by the monitor after 60 of 100 steps: loss is nan."),
        ("interrupted", "", "warn", "Interrupted after 60 of 100 steps; keel resume continues it."),
        ("running", "", "running", "Running, 60 of 100 steps done. Sound and learning so far:"),
        ("gone fishing", "", "warn", "Its state is unknown after 60 of 100 steps."),
    ],
)
def test_how_it_ended_is_said_first(make_rows, state, reason, level, words):
    found = judge(make_rows(60), Ending(state, reason, 60, 100))
    assert found["level"] == level
    assert found["text"].startswith(words)


def test_that_faults_were_planted_is_said_before_what_they_did(make_rows):
    rows = make_rows(60, **{"policy/recompute_max_dev": 0.4})
    alarm = {
        **{name: rows[0][name] for name in ("stage", "step")},
        "rule": "planted_faults",
        "severity": "warn",
        "text": "...",
        "first_step": rows[0]["step"],
    }
    found = find(rows, [alarm], bands(TrainConfig()), updates_per_batch=1)
    text = verdict(DONE, rows, found, EVALS)["text"]
    assert text.startswith("Faults were planted in it on purpose. Not reproducible at step 0:")


def test_a_running_run_that_is_broken_is_bad(make_rows):
    rows = make_rows(60, **{"policy/recompute_max_dev": 0.4})
    found = judge(rows, Ending("running", "", 60, 100))
    assert found["level"] == "bad"
    assert found["text"].startswith("Running, 60 of 100 steps done. Not reproducible at step 0:")


def test_a_warning_follows_the_summary(make_rows):
    found = judge(make_rows(100, **{"rollout/failed": 8.0}))
    assert found["level"] == "warn"
    assert found["text"].index("Sound and learning") < found["text"].index("Episodes fail at step 0")


@pytest.mark.parametrize(
    ("before", "after", "level", "words"),
    [
        (300, 305, "warn", "no progress shows"),
        (300, 200, "warn", "getting worse"),
        (505, 508, "good", "little is left to learn"),
    ],
)
def test_a_change_is_one_only_if_the_intervals_say_so(make_rows, before, after, level, words):
    evaluations = [
        {"name": name, "success": n / 512, "num_tasks": 512} for name, n in (("initial", before), ("final", after))
    ]
    found = judge(make_rows(100), evaluations=evaluations)
    assert found["level"] == level
    assert words in found["text"]


def test_without_evaluations_the_reward_speaks(make_rows):
    assert "Sound and learning: reward 0.323 → 0.773" in judge(make_rows(100), evaluations=())["text"]
    assert "no progress shows" in judge(make_rows(100, **{"reward/mean": 0.5}), evaluations=())["text"]
    assert "too short to say" in judge(make_rows(6), evaluations=())["text"]


def test_no_step_is_nothing_to_judge():
    found = judge([], Ending("starting", "", 0, 100), ())
    assert found["level"] == "running"
    assert found["text"] == "Starting. No step has finished, so there is nothing to judge yet."


def test_a_key_in_the_reason_of_a_crash_is_not_shown(make_rows):
    key = "hf_" + "aB3d" * 8
    assert key not in judge(make_rows(60), Ending("failed", f"OSError: 401 for {key}", 60, 100))["text"]


def told(rows, updates=1, problems=()):
    return notes(
        rows,
        find(rows, [], bands(TrainConfig()), updates_per_batch=updates),
        updates_per_batch=updates,
        problems=problems,
    )


def test_what_looks_wrong_and_is_right_is_explained(make_rows):
    rows = make_rows(100, **{"policy/clip_fraction": 0.0, "policy/grad_norm": lambda step: 0.0 if step < 7 else 0.2})
    said = told(rows)
    assert said[:2] == [LOSS_NOTE, CLIP_NOTE]
    assert said[2].startswith("On 7 of 100 steps the gradient was 0")


def test_the_explanations_are_left_out_where_they_do_not_hold(make_rows):
    rows = make_rows(100, **{"policy/clip_fraction": 0.2})
    assert told(rows) == [LOSS_NOTE]
    assert told(rows, updates=4) == []
    for row in rows:
        row["stage"] = "warm_start"
    assert told(rows) == []


def test_other_findings_and_what_could_not_be_read_are_in_the_notes(make_rows):
    rows = make_rows(100, **{"rollout/failed": 8.0, "policy/recompute_max_dev": 0.1})
    said = told(rows, problems=[f"file {n}: torn" for n in range(5)])
    assert said[0].startswith("Episodes fail at step 0")
    assert said[-1] == "Not everything could be read: file 0: torn; file 1: torn; file 2: torn; and 2 more."


def test_the_interval_of_a_difference_is_newcombes():
    """Table II of Newcombe 1998, example (a): 56/70 against 48/80 is 0.0524 to 0.3339 by method 10."""
    from keel.monitor.wilson import wilson_interval

    first, second = Estimate(48 / 80, *wilson_interval(48, 80)), Estimate(56 / 70, *wilson_interval(56, 70))
    found = difference(first, second)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert found.differs
    assert not difference(first, first).differs
