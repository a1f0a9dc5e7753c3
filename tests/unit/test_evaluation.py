"""What an evaluation says of its episodes: estimates against enumeration, published values and simulation."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keel.config import EvalConfig, ImpossibleConfigError, TrainConfig
from keel.evaluation import EvaluationError, evaluate, usual_ks, weights_of
from keel.evaluation_result import EvaluationResult, summarize
from keel.monitor.estimates import Estimate, mean_estimate, pass_at_k, share_estimate, t_quantile
from keel.monitor.rows import RunDirectoryError
from keel.monitor.wilson import wilson_interval
from keel.types import SamplingSettings, Segment, Task, TokenSpan, Trajectory, TrajectoryStatus, Turn


@pytest.mark.parametrize(("n", "c"), [(n, c) for n in range(1, 8) for c in range(n + 1)])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_success(n: int, c: int) -> None:
    attempts = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(attempts, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@pytest.mark.parametrize("arguments", [(0, 0, 1), (3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_pass_at_k_of_nothing_is_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="pass_at_k"):
        pass_at_k(*arguments)


def test_pass_at_k_is_exact_where_factors_overflow() -> None:
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, rel=1e-12)
    assert pass_at_k(10_000, 9_901, 100) == 1.0


@pytest.mark.parametrize(
    ("degrees", "published"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_students_t_is_that_of_the_tables(degrees: int, published: float) -> None:
    assert t_quantile(degrees) == pytest.approx(published, rel=2e-3)


def test_one_attempt_per_task_is_plain_wilson() -> None:
    found = share_estimate([1.0] * 81 + [0.0] * 182, 1)
    assert (found.value, found.low, found.high, found.num_tasks) == (81 / 263, *wilson_interval(81, 263), 263)
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, Wilson without continuity correction.
    assert (round(found.low or 0, 4), round(found.high or 0, 4)) == (0.2553, 0.3662)


def test_attempts_at_a_task_that_are_all_alike_count_once() -> None:
    assert share_estimate([1.0] * 10 + [0.0] * 10, 8) == share_estimate([1.0] * 10 + [0.0] * 10, 1)
    assert share_estimate([0.0] * 10, 8).high == wilson_interval(0, 10)[1]


def test_alike_tasks_count_with_all_their_attempts_and_no_more() -> None:
    found = share_estimate([0.5] * 20, 8)
    shrunk = 160 * (1.959963984540054 / t_quantile(19)) ** 2
    center, z2 = 0.5, 1.959963984540054**2
    half = math.sqrt(z2 * 0.25 / shrunk + z2 * z2 / (4 * shrunk**2)) / (1 + z2 / shrunk)
    assert (found.low, found.high) == (pytest.approx(center - half), pytest.approx(center + half))


def spread_tasks(draw: random.Random, num_tasks: int, attempts: int) -> list[int]:
    """Successes of `attempts` at tasks whose difficulties differ a lot (a beta distribution with both ends likely)."""
    return [
        sum(draw.random() < p for _ in range(attempts)) for p in (draw.betavariate(0.5, 1.5) for _ in range(num_tasks))
    ]


@pytest.mark.parametrize(("num_tasks", "attempts", "k"), [(10, 4, 1), (30, 8, 1), (30, 8, 4), (60, 4, 4)])
def test_intervals_hold_the_truth_as_often_as_they_say(num_tasks: int, attempts: int, k: int) -> None:
    """The population is known: E[1 - (1 - p)^k] of a beta distribution, by its moments."""
    a, b = 0.5, 1.5
    truth = 1 - math.prod((b + i) / (a + b + i) for i in range(k))
    draw = random.Random(num_tasks * attempts + k)
    held = naive_held = 0
    for _ in range(800):
        successes = spread_tasks(draw, num_tasks, attempts)
        found = share_estimate([pass_at_k(attempts, c, k) for c in successes], attempts / k)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
        low, high = wilson_interval(sum(successes), num_tasks * attempts)
        naive_held += low <= truth <= high
    assert 0.925 <= held / 800 <= 0.99
    if k == 1:
        assert naive_held / 800 < 0.85  # as if attempts at one task were independent


def test_the_interval_of_a_mean_is_students() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    found = mean_estimate(values)
    half = 3.182446305 * np.std(values, ddof=1) / 2  # the quantile from a table
    assert found.value == 4.0
    assert (found.low, found.high) == (pytest.approx(4.0 - half, abs=0.01), pytest.approx(4.0 + half, abs=0.01))
    assert mean_estimate([3.0]) == Estimate(3.0, None, None, 1)
    assert mean_estimate([0.0] * 8) == Estimate(0.0, None, None, 8)


# Results


def episode(
    task: str,
    reward: float,
    success: bool | None,
    status: TrajectoryStatus = "completed",
    *,
    malformed: bool = False,
    tokens: int = 3,
) -> Trajectory:
    span = TokenSpan((1,) * tokens, "policy", (-0.5,) * tokens, 0, SamplingSettings())
    turn = Turn((), "text", "stop", 0, 0, malformed="no end" if malformed else None)
    segments = (Segment((span,)),)
    return Trajectory(Task(task), task, 0, (), (turn,), segments, status, reward=reward, success=success)


def result(episodes: Sequence[Trajectory], attempts: int, ks: Sequence[int] = (1, 2), **names: Any) -> EvaluationResult:
    options = {"model": "m", "env": "e", "temperature": 1.0, "seed": 0, **names}
    return summarize(episodes, attempts=attempts, ks=ks, **options)


EPISODES = [
    *(episode("a", 1.0, True), episode("a", 0.0, False, "truncated", tokens=5), episode("a", 0.5, False)),
    *(episode("b", 1.0, True), episode("b", 9.0, True, "env_error"), episode("b", 9.0, True, "engine_error")),
    *(episode("c", 0.0, False, malformed=True), episode("c", 0.0, None), episode("c", 0.0, False)),
    *(episode("d", 9.0, True, "env_timeout"),) * 3,
]


def test_what_the_world_spoilt_is_counted_and_left_out() -> None:
    found = result(EPISODES, attempts=3)
    assert (found.num_tasks, found.num_episodes, found.failed, found.truncated, found.malformed) == (3, 12, 5, 1, 1)
    assert found.success is not None
    assert found.success.value == pytest.approx((1 / 3 + 1 + 0) / 3)  # over tasks, not over the 7 episodes that count
    assert found.reward.value == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert found.pass_at_k[1].value == pytest.approx(found.success.value)
    assert found.pass_at_k[2] == share_estimate([pass_at_k(3, 1, 2), 0.0], 1.5)  # b has one attempt that counts
    assert found.tokens == pytest.approx((6 * 3 + 5) / 7)
    assert found.tasks[1].rewards == (1.0, None, None)
    assert found.tasks[1].statuses == ("completed", "env_error", "engine_error")
    assert found.tasks[3].num_kept == 0


def test_metrics_are_the_rows_columns() -> None:
    found = result(EPISODES, attempts=3).metrics
    assert {"success", "success_low", "success_high", "reward", "num_tasks", "failed", "tokens", "turns"} <= set(found)
    assert found["pass@2_low"] < found["pass@2"] < found["pass@2_high"]
    assert {name: found[name] for name in ("num_tasks", "attempts", "failed", "truncated", "malformed")} == {
        "num_tasks": 3.0,
        "attempts": 3.0,
        "failed": 5.0,
        "truncated": 1.0,
        "malformed": 1.0,
    }
    single = result(EPISODES[::3], attempts=1, ks=(1,)).metrics
    assert not [name for name in single if "pass@" in name]  # it is the success


def test_an_environment_that_says_no_success_has_none() -> None:
    found = result([episode("a", 1.0, None), episode("b", 0.0, None)], attempts=1, ks=(1,))
    assert found.success is None
    assert found.pass_at_k == {}
    assert "success" not in found.metrics
    assert "success" not in str(found)


def test_a_result_is_json_and_shows_foreign_text_as_text() -> None:
    hostile = "<script>alert(1)</script>\x1b[31m\u202e&"
    found = result(EPISODES, attempts=3, model=hostile, env=hostile)
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["schema_version"] == 1
    assert value["pass_at_k"]["2"]["num_tasks"] == 2
    assert value["tasks"][0]["successes"] == [True, False, False]
    shown = found._repr_html_()
    assert "<script" not in shown
    assert "&lt;script&gt;" in shown
    assert "\x1b" not in str(found)
    assert "\u202e" not in str(found)
    assert "\x1b" not in shown


@pytest.mark.parametrize(("attempts", "ks"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_the_usual_ks(attempts: int, ks: tuple[int, ...]) -> None:
    assert usual_ks(attempts) == ks


# What can be evaluated


@pytest.mark.parametrize(
    "section",
    [{"attempts": 4, "temperature": 0.0}, {"attempts": 4, "k": [1, 8]}, {"attempts": 0}, {"attempts": 4, "k": [0]}],
)
def test_evaluations_that_cannot_be_are_refused_with_the_config(section: dict[str, Any]) -> None:
    with pytest.raises((ImpossibleConfigError, ValueError)):
        TrainConfig.model_validate({"eval": section})
    assert EvalConfig(attempts=4, k=(1, 4)).k == (1, 4)


def test_what_is_no_source_is_told(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"neither a run .* nor a model"):
        evaluate(tmp_path)
    with pytest.raises(EvaluationError, match="no run is given"):
        evaluate({"seed": 1}, checkpoint=3)
    (tmp_path / "config.toml").write_text("seed = 1\n")
    with pytest.raises(RunDirectoryError, match="has no checkpoint yet"):
        evaluate(tmp_path)


def test_weights_are_found_in_a_checkpoint_and_in_a_run(tmp_path: Path) -> None:
    newest = tmp_path / "checkpoints" / "000010"
    for path in (tmp_path / "checkpoints" / "000002", newest):
        (path / "weights").mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
    (tmp_path / "config.toml").write_text("seed = 1\n")
    assert weights_of(tmp_path) == weights_of(newest) == weights_of(newest / "weights") == newest / "weights"
