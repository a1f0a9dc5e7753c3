from __future__ import annotations

from keel.report.choice import Candidate, choose
from keel.types import Task, Trajectory, Turn


def attempt(step, index, reward, *, gap=0.0, surprise=1.0, drawn=10, malformed=None):
    turn = Turn((), "", "stop", 0, 1, malformed=malformed)
    trajectory = Trajectory(Task("t"), "g", index, (), (turn,), (), "completed", reward=reward)
    return Candidate(step, index, trajectory, gap, surprise, drawn)


def refs(found, **options):
    return {name: candidate.ref for name, (candidate, _) in choose(found, **options).items()}


CROWD = [attempt(step, index, index / 10) for step in (1, 2) for index in range(10)]


def test_best_is_the_highest_reward_lately_in_few_tokens_and_worst_the_lowest():
    shorter = attempt(2, 20, 0.9, drawn=3)
    found = refs([*CROWD, shorter])
    assert (found["best"], found["worst"]) == ("2/20", "2/0")
    unreadable = attempt(3, 0, -1.0, malformed="no channel")
    assert choose([*CROWD, unreadable])["worst"][1].endswith("; a reply of it could not be read")


def test_the_strangest_is_first_of_all_where_engine_and_learner_part():
    found = [
        *CROWD,
        attempt(1, 30, 0.5, gap=0.3),
        attempt(1, 31, 0.85, malformed="no channel"),
        attempt(1, 32, 0.8, surprise=50),
    ]
    assert refs(found)["strangest"] == "1/30"
    assert refs(found, gap_limit=0.5)["strangest"] == "1/31"
    assert refs(found[:-2] + found[-1:], gap_limit=0.5)["strangest"] == "1/32"
    reason = choose(found)["strangest"][1]
    assert "differ by 0.3 nats on one token" in reason


def test_a_failure_however_unlikely_is_no_unlikely_success():
    assert refs([*CROWD, attempt(1, 33, 0.1, surprise=500)])["strangest"] != "1/33"


def test_where_all_rewards_are_alike_the_odd_length_is_strange():
    alike = [attempt(1, index, 1.0, drawn=10) for index in range(9)] + [attempt(1, 9, 1.0, drawn=400)]
    found = choose(alike)
    assert set(found) == {"best", "strangest"}
    assert found["strangest"][0].ref == "1/9"


def test_the_three_are_three_and_fewer_if_there_are_fewer():
    assert len(set(refs(CROWD).values())) == 3
    assert refs([attempt(1, 0, 1.0)]) == {"best": "1/0"}
    assert refs([]) == {}
