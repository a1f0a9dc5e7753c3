from __future__ import annotations

import math

import pytest

from keel.config import TrainConfig
from keel.monitor.bands import MISMATCH, bands
from keel.report.findings import find

FLOAT32 = bands(TrainConfig())


def rules(rows, alarms=(), updates=1):
    return {each.rule: each for each in find(rows, alarms, FLOAT32, updates_per_batch=updates)}


def test_a_sound_run_has_no_finding(make_rows):
    assert rules(make_rows(100)) == {}
    assert rules([]) == {}


def lost(rows, steps, *names):
    for step in steps:
        for name in names:
            rows[step][name] = None
            rows[step]["not_finite"][name] = "nan"
    return rows


def test_values_that_are_not_finite_break_a_run_from_the_first_on(make_rows):
    found = rules(lost(make_rows(100), (37, 38, 39), "policy/loss", "policy/grad_norm"))["not_finite"]
    assert (found.severity, found.row["step"]) == ("bad", 37)
    assert "the loss and the gradient were not finite" in found.text
    assert "3 of 100 steps" in found.text


def test_one_of_hundreds_is_a_stumble_unless_it_is_the_last(make_rows):
    assert rules(lost(make_rows(300), (37,), "policy/grad_norm"))["not_finite"].severity == "warn"
    assert rules(lost(make_rows(300), (299,), "policy/grad_norm"))["not_finite"].severity == "bad"


def test_a_ratio_off_one_is_a_fault_only_with_one_update_a_batch(make_rows):
    rows = make_rows(50, **{"policy/ratio_max_dev": lambda step: 1e-9 if step == 20 else 0.0})
    assert rules(rows)["ratio"].row["step"] == 20
    assert rules(rows)["ratio"].severity == "bad"
    assert rules(rows, updates=4) == {}


@pytest.mark.parametrize(("deviation", "severity"), [(1e-6, "warn"), (0.02, "bad")])
def test_a_second_pass_must_give_the_same_bits(make_rows, deviation, severity):
    rows = make_rows(50, **{"policy/recompute_max_dev": lambda step: deviation if step >= 11 else 0.0})
    assert (rules(rows)["recompute"].severity, rules(rows)["recompute"].row["step"]) == (severity, 11)


def test_engine_and_learner_that_part_are_found_where_they_leave_the_band(make_rows):
    limit = FLOAT32[MISMATCH].healthy_max
    rows = make_rows(100, **{MISMATCH: lambda step: 2e-7 * 1.2 ** max(0, step - 30)})
    first = next(row["step"] for row in rows if row[MISMATCH] > limit)
    assert (rules(rows)["mismatch"].severity, rules(rows)["mismatch"].row["step"]) == ("bad", first)


def test_a_little_too_much_mismatch_warns_and_a_single_step_of_it_does_not(make_rows):
    assert rules(make_rows(100, **{MISMATCH: 2e-5}))["mismatch"].severity == "warn"
    assert rules(make_rows(100, **{MISMATCH: lambda step: 2e-5 if step == 9 else 2e-7})) == {}


def test_outliers_that_a_router_explains_are_no_finding(make_rows):
    explained = {MISMATCH: 2e-5, "mismatch/outliers": 3.0, "mismatch/outliers_routed": 3.0}
    assert rules(make_rows(100, **explained)) == {}
    assert "mismatch" in rules(make_rows(100, **{**explained, "mismatch/outliers_routed": 2.0}))


def noisy(step):
    return 0.03 * math.sin(step * 2.4)


def test_a_reward_that_falls_and_stays_down_has_collapsed(make_rows):
    def reward(step):
        return (0.2 + 0.6 * step / 100 if step < 100 else 0.1) + noisy(step)

    found = rules(make_rows(200, **{"reward/mean": reward}))["reward_collapse"]
    assert found.severity == "bad"
    assert 100 <= found.row["step"] <= 110


def test_noise_a_dip_and_a_plateau_are_no_collapse(make_rows):
    assert rules(make_rows(200, **{"reward/mean": lambda step: 0.5 + noisy(step)})) == {}
    assert rules(make_rows(200, **{"reward/mean": lambda step: 0.1 if 80 < step < 110 else 0.8 + noisy(step)})) == {}
    assert rules(make_rows(200, **{"reward/mean": lambda step: min(0.8, step / 100) + noisy(step)})) == {}


def test_entropy_that_is_gone_is_a_finding_only_while_tasks_are_unsolved(make_rows):
    def entropy(step):
        return 0.8 * math.exp(-step / 10)

    found = rules(make_rows(100, **{"policy/entropy": entropy, "reward/mean": 0.3}))["entropy_collapse"]
    assert found.severity == "bad"
    assert 35 <= found.row["step"] <= 45
    assert rules(make_rows(100, **{"policy/entropy": entropy, "success": 0.97})) == {}


def test_entropy_that_erupts_is_found_where_it_leaves_three_times_its_start(make_rows):
    rows = make_rows(100, **{"policy/entropy": lambda step: 0.5 if step < 60 else 0.5 + 0.2 * (step - 60)})
    found = rules(rows)["entropy_eruption"]
    assert (found.severity, 60 < found.row["step"] < 75) == ("bad", True)
    assert rules(make_rows(100, **{"policy/entropy": lambda step: 0.5 + 0.004 * step})) == {}


@pytest.mark.parametrize(("failed", "severity"), [(8.0, "warn"), (40.0, "bad"), (1.0, None)])
def test_worlds_that_fail_are_counted(make_rows, failed, severity):
    found = rules(make_rows(50, **{"rollout/failed": lambda step: failed if step >= 5 else 0.0}))
    assert (found["failed"].severity, found["failed"].row["step"]) == (severity, 5) if severity else not found


def test_most_episodes_cut_short_warn(make_rows):
    assert rules(make_rows(50, **{"rollout/truncated": 40.0}))["truncated"].severity == "warn"
    assert rules(make_rows(50, **{"rollout/truncated": 20.0})) == {}


def test_groups_without_signal_warn_unless_the_tasks_are_solved(make_rows):
    assert rules(make_rows(50, **{"rollout/signal_share": 0.04}))["no_signal"].severity == "warn"
    assert rules(make_rows(50, **{"rollout/signal_share": 0.04, "success": 0.99})) == {}


def alarm(step, rule, severity, text="seen"):
    return {
        "train_step": step + 1,
        "stage": "reinforcement",
        "step": step,
        "first_step": step,
        "rule": rule,
        "severity": severity,
        "text": text,
    }


def test_an_alarm_that_stopped_the_run_is_bad_and_others_are_notes_each_rule_once(make_rows):
    alarms = [
        alarm(5, "spike", "warn"),
        alarm(6, "spike", "warn"),
        alarm(7, "other", "skip"),
        alarm(9, "other", "stop"),
    ]
    found = rules(make_rows(20), alarms)
    assert {rule: (each.severity, each.row["step"]) for rule, each in found.items()} == {
        "other": ("bad", 9),
        "spike": ("note", 5),
    }


def test_an_alarm_does_not_repeat_what_the_rows_say_themselves(make_rows):
    rows = lost(make_rows(50), range(40, 50), "policy/grad_norm")
    found = find(rows, [alarm(40, "not_finite", "stop")], FLOAT32, updates_per_batch=1)
    assert [each.rule for each in found] == ["not_finite"]


def test_bad_findings_come_first_then_the_earlier(make_rows):
    rows = make_rows(100, **{"rollout/failed": 8.0, "policy/recompute_max_dev": lambda step: 0.1 if step > 80 else 0.0})
    rows = lost(rows, (90, 91, 92), "policy/loss")
    found = find(rows, [], FLOAT32, updates_per_batch=1)
    assert [each.rule for each in found] == ["recompute", "not_finite", "failed"]


def test_the_band_is_bfloat16s_for_bfloat16_and_for_a_config_that_cannot_be_read():
    bfloat16 = TrainConfig.model_validate({"model": {"dtype": "bfloat16"}})
    assert bands(bfloat16)[MISMATCH].healthy_max == bands(None)[MISMATCH].healthy_max == 0.03
    assert bands(TrainConfig())[MISMATCH].healthy_max == 1e-5
