"""What is not finite never reaches the weights, and does not go on for ever."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass

import pytest

from keel.config import MonitorConfig
from keel.monitor import Monitor
from keel.monitor.rules import REPEAT_AFTER, SIGNAL_WINDOW, Alarm, NoSignal, make_monitor


@dataclass
class Update:
    loss: float
    grad_norm: float


FINE = Update(0.3, 1.0)
BROKEN = [Update(math.nan, 1.0), Update(0.3, math.inf), Update(-math.inf, math.nan)]


def test_a_finite_update_goes():
    verdict = Monitor(3).judge(FINE)
    assert (verdict.action, verdict.reason) == ("go", "")


@pytest.mark.parametrize("update", BROKEN)
def test_a_broken_update_is_skipped_with_its_reason(update):
    monitor = Monitor(3)
    verdict = monitor.judge(update)
    assert verdict.action == "skip"
    assert not verdict.goes
    assert not verdict.stops
    assert ("loss is" in verdict.reason) == (not math.isfinite(update.loss))
    assert ("gradient norm is" in verdict.reason) == (not math.isfinite(update.grad_norm))
    assert monitor.skips == 1


def test_skips_in_a_row_stop_the_run():
    monitor = Monitor(3)
    assert [monitor.judge(update).action for update in BROKEN] == ["skip", "skip", "stop"]


def test_a_good_update_between_starts_the_count_again():
    monitor = Monitor(2)
    actions = [monitor.judge(update).action for update in (BROKEN[0], FINE, BROKEN[1], FINE, BROKEN[2], BROKEN[0])]
    assert actions == ["skip", "go", "skip", "go", "skip", "stop"]
    assert monitor.skips == 4


def test_a_resumed_monitor_judges_as_the_undisturbed_one():
    first = Monitor(2)
    first.judge(BROKEN[0])
    second = Monitor(2)
    second.restore(first.state())
    assert second.judge(BROKEN[1]).stops
    assert second.state() == {"skips_in_a_row": 2, "skips": 2, "rules": {}}


def test_the_limit_is_at_least_one():
    with pytest.raises(ValueError, match="max_skips"):
        Monitor(0)


def row(zero_share, *, groups=10.0, group_size=4, **values):
    """A step's metrics as the loop hands them over."""
    return {
        "rollout/groups": groups,
        "rollout/episodes": groups * group_size,
        "rollout/failed": 0.0,
        "rollout/turns": 1.0,
        "rollout/malformed": 0.0,
        "rollout/truncated": 0.0,
        "rollout/signal_share": 1.0 - zero_share,
        "advantage/groups": groups,
        "advantage/zero_share": zero_share,
        "reward/mean": 0.0,
        "success": 0.0,
        "time/step_s": 0.5,
        **values,
    }


def alarms_of(rule, zero_shares, start=0):
    return [(step, rule.watch("reinforcement", step, row(share))) for step, share in enumerate(zero_shares, start)]


def raised(alarms):
    return [step for step, alarm in alarms if alarm is not None]


def test_every_update_not_taken_is_an_alarm_of_its_step():
    """Two updates a step: one skipped at step 0, then two, of which the second ends the run."""
    monitor = Monitor(2)
    monitor.judge(BROKEN[0])
    monitor.judge(FINE)
    assert monitor.watch("reinforcement", 0, row(0.0)) == [Alarm("not_finite", "skip", "loss is nan", 0)]
    assert monitor.watch("reinforcement", 1, row(0.0)) == []
    monitor.judge(BROKEN[0])
    monitor.judge(BROKEN[0])
    stop = "loss is nan; 2 updates in a row were skipped"
    assert monitor.watch("reinforcement", 2, row(0.0)) == [
        Alarm("not_finite", "skip", "loss is nan", 2),
        Alarm("not_finite", "stop", stop, 2),
    ]


def test_one_poor_step_does_not_warn_and_a_poor_window_does():
    poor, rich = 1.0, 0.0
    assert raised(alarms_of(NoSignal(0.1), [poor] * (SIGNAL_WINDOW - 1))) == []
    assert raised(alarms_of(NoSignal(0.1), [poor] * SIGNAL_WINDOW)) == [SIGNAL_WINDOW - 1]
    assert raised(alarms_of(NoSignal(0.1), [rich, poor, poor, poor, poor, poor, rich])) == [5]
    assert raised(alarms_of(NoSignal(0.1), [rich, poor, poor, poor, poor] * 4)) == []


def test_the_limit_is_a_share_of_groups_over_the_window():
    """Of five steps of 10 groups, 5 carry a signal (10 %): that is enough; 4 are not. Steps of other sizes weigh so."""
    assert raised(alarms_of(NoSignal(0.1), [0.9] * 5)) == []
    assert raised(alarms_of(NoSignal(0.1), [0.9] * 4 + [1.0])) == [4]
    rule = NoSignal(0.1)
    sizes = [(2.0, 0.0), (10.0, 1.0), (10.0, 1.0), (10.0, 1.0), (10.0, 1.0)]  # 2 of 42 groups
    found = [rule.watch("reinforcement", n, row(zero, groups=groups)) for n, (groups, zero) in enumerate(sizes)]
    assert found[-1] is not None
    assert found[-1].text.startswith("only 2 of 42 groups (5 %) of the last 5 steps carry a signal")


def test_groups_that_the_world_spoilt_carry_no_signal():
    """All attempts of 9 of 10 groups failed; in the one left rewards differ. Not 100 %, but 10 %."""
    metrics = row(0.0, **{"advantage/groups": 1.0, "rollout/failed": 36.0})
    rule = NoSignal(0.11)
    last = [rule.watch("reinforcement", step, metrics) for step in range(SIGNAL_WINDOW)][-1]
    assert last is not None
    assert "90 % of episodes failed" in last.text


def test_the_warning_is_repeated_now_and_then_and_says_since_when():
    rule = NoSignal(0.1)
    alarms = alarms_of(rule, [0.0, 0.0] + [1.0] * 50)
    assert raised(alarms) == [6, 6 + REPEAT_AFTER, 6 + 2 * REPEAT_AFTER]
    assert {alarm.first_step for _, alarm in alarms if alarm} == {2}


def test_a_share_that_rises_and_falls_does_not_warn_at_every_fall():
    rule = NoSignal(0.1)
    alarms = alarms_of(rule, ([1.0] * 6 + [0.0] * 2) * 8)
    steps = raised(alarms)
    assert steps[0] == 4
    assert all(after - before >= REPEAT_AFTER for before, after in itertools.pairwise(steps))
    second = next(alarm for step, alarm in alarms if step == steps[1])
    assert second is not None
    assert second.first_step > 6  # it is about the present spell, not the first


def test_demonstrations_are_not_watched():
    rule = NoSignal(0.1)
    assert [rule.watch("warm_start", step, row(1.0)) for step in range(20)] == [None] * 20


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_resumed_rule_alarms_as_the_undisturbed_one(cut):
    shares = [0.0, 1.0, 1.0] + [1.0] * 12 + [0.0] * 4 + [1.0] * 25
    undisturbed = alarms_of(make_monitor(MonitorConfig()).rules[0], shares)
    first, second = make_monitor(MonitorConfig()), make_monitor(MonitorConfig())
    before = alarms_of(first.rules[0], shares[:cut])
    second.restore(json.loads(json.dumps(first.state())))
    assert before + alarms_of(second.rules[0], shares[cut:], cut) == undisturbed


def test_zero_turns_the_rule_off():
    assert make_monitor(MonitorConfig(min_signal_share=0.0)).rules == ()
    assert make_monitor(MonitorConfig(max_skips=7)).max_skips == 7
