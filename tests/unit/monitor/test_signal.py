"""Why groups carry no signal: each cause is told by what makes it, and not by what does not."""

from __future__ import annotations

import pytest

from keel.monitor.signal import Outcomes, likely_causes, percent
from keel.rollouts.metrics import rollout_metrics
from keel.types import Group, Message, Task, Trajectory, Turn

TASK = Task("t")


def attempt(reward=0.0, *, success=None, status="completed", malformed=None):
    turn = Turn((Message("assistant", "x"),), "x", "stop", 0, 0, malformed=malformed)
    return Trajectory(TASK, "g", 0, (), (turn,), (), status, reward=reward, success=success)


def outcomes(*groups):
    made = [Group("g", TASK, tuple(group)) for group in groups]
    return Outcomes.of(rollout_metrics(made, 1.0))


RIGHT, WRONG = attempt(1.0, success=True), attempt(0.0, success=False)
FAILED = attempt(status="env_error")


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ([RIGHT] * 4, ["all_right"]),
        ([WRONG] * 4, ["all_wrong"]),
        ([FAILED] * 2 + [RIGHT] * 2, ["all_right", "failing"]),
        ([FAILED] * 4, ["failing"]),
        ([attempt(success=False, malformed="no end")] * 4, ["malformed"]),
        ([attempt(0.5, status="truncated")] * 4, ["truncated"]),
        ([attempt(0.5)] * 4, ["alike"]),
        ([RIGHT] * 2 + [WRONG] * 2, ["alike"]),
    ],
)
def test_causes(group, names):
    assert [cause.name for cause in likely_causes(outcomes(group))] == names


def test_of_episodes_and_of_advantages():
    """Rewards that differ are a signal; once advantages are known they decide, and failed groups count as none."""
    seen = outcomes([RIGHT, WRONG], [RIGHT, RIGHT], [FAILED, FAILED], [WRONG, FAILED])
    assert (seen.groups, seen.with_signal, seen.episodes, seen.kept) == (4, 1, 8, 5)
    assert seen.success_share == seen.mean_reward == 3 / 5
    assert seen.failed_share == 3 / 8
    metrics = rollout_metrics([Group("g", TASK, (RIGHT, WRONG))] * 4, 1.0)
    later = Outcomes.of({**metrics, "advantage/groups": 3.0, "advantage/zero_share": 1 / 3})
    assert (later.groups, later.with_signal) == (4, 2)


def test_sums_weigh_by_episodes():
    """One right of one, and one of three: two of four, whatever the steps' own means were."""
    both = outcomes([RIGHT]) + outcomes([RIGHT, WRONG, WRONG])
    assert both.success_share == both.mean_reward == 0.5
    unjudged = both + outcomes([attempt(0.5)] * 4)
    assert unjudged.success_share == 0.5  # those who do not say are not counted as wrong
    assert unjudged.mean_reward == 0.5


def test_nothing_at_all_divides_by_nothing():
    nothing = Outcomes()
    assert nothing.signal_share == nothing.failed_share == nothing.malformed_share == nothing.truncated_share == 0.0
    assert nothing.success_share is None


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.5, "50 %"), (0.001, "0.1 %"), (0.9999, "99.9 %"), (0.07, "7 %")],
)
def test_little_is_not_shown_as_none_nor_most_as_all(share, text):
    assert percent(share) == text
