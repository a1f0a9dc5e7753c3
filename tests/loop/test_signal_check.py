"""`keel rollout` sees what `keel train` begins with, whatever the environment does; a run without a signal says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import keel
from keel.chat.base import Reply
from keel.config import TrainConfig
from keel.monitor.rules import SIGNAL_WINDOW
from keel.signal_check import rollout

MakeConfig = Callable[..., TrainConfig]


class Asking(keel.Env):
    """Asks, and judges a reply by `worth`."""

    def tasks(self, split):
        return [keel.Task(f"{split} {number}", {"number": number}) for number in range(6)]

    def reset(self, task):
        return [keel.Message("user", f"Say {task.data['number']}.")]

    def worth(self, reply: Reply) -> float:
        return 1.0

    def step(self, reply):
        return keel.Step(done=True, reward=self.worth(reply), success=self.worth(reply) == 1.0)


class Gone(Asking):
    def step(self, reply):
        raise ConnectionError("the sandbox is gone")


class Worthless(Asking):
    def worth(self, reply):
        return 0.0


class Lengthy(Asking):
    def worth(self, reply):
        return float(len(reply.text) % 3)

    def demonstrations(self, count, *, seed, start):
        reply = (keel.Message("assistant", "three", channel="final"),)
        return [keel.Demonstration(self.tasks("train")[(start + index) % 6], (reply,)) for index in range(count)]


@pytest.fixture
def config(make_config: MakeConfig, tmp_path: Path) -> TrainConfig:
    rollouts = {"groups_per_step": 3, "group_size": 4, "max_new_tokens": 12}
    return make_config(tmp_path / "run", steps=1, warm_start={"steps": 0}, rollout=rollouts)


def rows_of(run_dir: str) -> list[dict]:
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("warm", [0, 3])
def test_it_sees_what_the_run_begins_with(make_config, tmp_path, warm):
    """The same episodes, the same learner's pass, to the bit: after the warm start, if there is one."""
    rollouts = {"groups_per_step": 3, "group_size": 4, "max_new_tokens": 12}
    warm_start = {"steps": warm, "demonstrations_per_step": 4}
    config = make_config(tmp_path / "run", steps=1, rollout=rollouts, warm_start=warm_start)
    found = rollout(config, num_tasks=3, env=Lengthy)
    row = next(row for row in rows_of(keel.train(config, env=Lengthy).run_dir) if row.get("stage") == "reinforcement")
    same = [name for name in found.metrics if name in row and not name.startswith(("time/", "memory/"))]
    same = [name for name in same if not name.endswith(("_s", "staleness", "/mfu"))]  # versions differ, weights do not
    assert {"mismatch/abs_mean", "policy/entropy", "policy/grad_norm", "rollout/tokens", "reward/mean"} <= set(same)
    assert {name: found.metrics[name] for name in same} == {name: row[name] for name in same}
    assert found.metrics["policy/recompute_max_dev"] == found.metrics["policy/ratio_max_dev"] == 0.0
    assert not (tmp_path / "runs").exists()


def test_no_learner_same_episodes(config):
    with_it, without = (
        rollout(config, num_tasks=2, env=Lengthy),
        rollout(config, num_tasks=2, env=Lengthy, with_learner=False),
    )
    assert [t.segments for t in with_it.trajectories] == [t.segments for t in without.trajectories]
    assert [t.reward for t in with_it.trajectories] == [t.reward for t in without.trajectories]
    assert with_it.projection.learn_s is not None
    assert without.projection.learn_s is None
    assert not [name for name in without.metrics if name.startswith(("policy/", "mismatch/"))]
    assert len(without.trajectories) == 8
    scale = config.rollout.groups_per_step / 2
    assert without.projection.rollout_s == pytest.approx(scale * without.metrics["time/rollout_s"])


@pytest.mark.parametrize(("env", "cause"), [(Gone, "failing"), (Asking, "all_right"), (Worthless, "truncated")])
def test_why_there_is_no_signal(config, env, cause):
    """An environment that fails, one that always pays, one that never does to a model that only babbles."""
    found = rollout(config, num_tasks=2, env=env)
    assert found.judgement.level == "none"
    assert found.judgement.causes[0].name == cause
    assert len(found.trajectories) == 8
    if env is Gone:
        reason, count = found.reasons("failed")[0]
        told = "env_error: step() raised ConnectionError: the sandbox is gone"
        assert (reason.partition(" (")[0], count) == (told, 8)
        assert found.projection.step_s is None


def test_more_tasks_than_there_are_is_said(config):
    found = rollout(config, num_tasks=8, env=Lengthy, with_learner=False)
    assert len(found.groups) == 8
    assert any("6 training task" in note for note in found.notes)


def test_less_than_one_task_is_refused(config):
    with pytest.raises(ValueError, match="num_tasks got 0"):
        rollout(config, num_tasks=0)


def test_a_run_without_a_signal_says_so(make_config, tmp_path, capsys):
    rollouts = {"groups_per_step": 2, "group_size": 2, "max_new_tokens": 4}
    steps = SIGNAL_WINDOW + 1
    summary = keel.train(
        make_config(tmp_path / "run", steps=steps, warm_start={"steps": 0}, rollout=rollouts), env=Asking
    )
    alarms = [row for row in rows_of(summary.run_dir) if row["kind"] == "alarm"]
    assert [(row["rule"], row["severity"], row["step"], row["first_step"]) for row in alarms] == [
        ("no_signal", "warn", SIGNAL_WINDOW - 1, 0)
    ]
    assert "0 of 10 groups" in alarms[0]["text"]
    assert "too easy" in alarms[0]["text"]
    assert summary.alarms == {"no_signal": 1}
    assert alarms[0]["text"] in capsys.readouterr().out.replace("\n", " ")
    assert keel.load_run(summary.run_dir).alarms == alarms
