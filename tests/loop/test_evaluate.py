"""Own tasks trained on through the Python API, and what a run, a checkpoint or a bare model is worth, told the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import keel
from keel.cli import app
from keel.config_problems import ConfigError
from keel.evaluation import EvaluationError
from keel.rollouts.store import read_trajectories
from keel.secrecy import SecretError
from keel.types import Task, Trajectory

ROWS = [{"question": f"Which letter, {letter}?", "answer": letter} for letter in "abcdefghijklmnopqrstuvwxyz"] * 2


def first_letter(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    return [float(text.strip()[:1] == right) for text, right in zip(completions, answer, strict=True)]


def broken_at_a(trajectory: Trajectory, task: Task) -> float:
    if task.data["answer"] in "abcdefghijklm":
        raise OSError("the judge is away")
    return 0.5


own = keel.task_env(ROWS, reward=["exact_match", (first_letter, 0.5)], eval_share=0.25)
failing = keel.task_env(ROWS, reward=[first_letter, broken_at_a], eval_share=0.25)


class Leaking(keel.Env):
    """Holds out four tasks, the first three of which are trained on under other names; the tasks of no data by name."""

    def tasks(self, split: str) -> list[Task]:
        if split == "train":
            return [*(Task(f"train {n}", {"n": n}) for n in range(3)), Task("bare")]
        return [*(Task(f"eval {n}", {"n": n}) for n in range(4)), Task("bare"), Task("bare too")]

    def reset(self, task: Task) -> list[keel.Message]:
        return [keel.Message("user", task.id)]

    def step(self, reply: Any) -> keel.Step:
        return keel.Step(done=True, reward=float(len(reply.text)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_config: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("own") / "run"
    config = make_config(
        path,
        "gpt_oss",
        steps=2,
        env={"id": "", "options": {}},
        model={"tiny": {"preset": "gpt_oss", "vocab_size": 300, "options": {"num_hidden_layers": 2}}},
        warm_start={"steps": 16},
        rollout={"max_new_tokens": 16},
        checkpoint={"every": 1, "keep": 2},
        eval={"num_tasks": 6, "attempts": 4},
    )
    assert keel.train(config, env=own).state == "completed"
    return path


def test_own_tasks_are_learned_and_every_part_is_logged(run: Path) -> None:
    rows = keel.load_run(run).rows
    steps = [row for row in rows if row["kind"] == "step" and row["stage"] == "reinforcement"]
    assert {"reward/exact_match", "reward/first_letter", "success"} <= set(steps[0])
    for row in steps:
        whole = row["reward/exact_match"] + 0.5 * row["reward/first_letter"]
        assert row["reward/mean"] == pytest.approx(whole)
    initial, *_, final = [row for row in rows if row["kind"] == "eval"]
    assert initial["eval/success"] == 0.0
    for row in (initial, final):
        assert {f"eval/pass@{k}{end}" for k in (1, 2, 4) for end in ("", "_low", "_high")} <= set(row)
        assert row["eval/attempts"] == 4.0
    tasks = {t.task.id for step in (0, 1) for t in keel.load_run(run).trajectories(step)}
    assert not tasks & {task.id for task in own().tasks("eval")}


def test_held_out_tasks_that_are_trained_on_are_told_of(run: Path, tmp_path: Path, make_config: Any) -> None:
    assert not any(alarm["rule"] == "held_out_shared" for alarm in keel.load_run(run).alarms)
    leaking = make_config(
        tmp_path / "run",
        "gpt_oss",
        steps=1,
        env={"id": "", "options": {}},
        warm_start={"steps": 0},
        rollout={"max_new_tokens": 4},
        eval={"num_tasks": 6},
    )
    keel.train(leaking, env=Leaking)
    (alarm,) = [each for each in keel.load_run(tmp_path / "run").alarms if each["rule"] == "held_out_shared"]
    assert alarm["severity"] == "warn"
    assert alarm["text"].startswith("4 of the 6 tasks of the evaluation")


def test_a_runs_newest_checkpoint_is_its_last_evaluation(run: Path, tmp_path: Path) -> None:
    found = keel.evaluate(run, env=own, record=True, save=tmp_path / "kept", json_file=tmp_path / "found.json")
    final = keel.load_run(run).evaluations[-1]
    assert found.metrics == {name: final[name] for name in found.metrics}
    newest = keel.load_run(run).checkpoints[-1].name
    recorded = json.loads((run / "evaluations" / f"{newest}.json").read_text())
    written = json.loads((tmp_path / "found.json").read_text())
    assert {"name": newest, **written} == recorded
    assert (recorded["kind"], recorded["schema_version"], recorded["checkpoint"]) == ("evaluation", 1, newest)
    assert recorded["success"]["value"] == found.success.value  # type: ignore[union-attr]
    assert recorded["config"]["eval"]["num_tasks"] == 6
    kept = read_trajectories(tmp_path / "kept" / "trajectories.jsonl")
    assert [t.task.id for t in kept] == [task.task_id for task in found.tasks for _ in range(4)]
    assert all(t.segments for t in kept)
    draws = [tuple(segment.token_ids for segment in t.segments) for t in kept]
    assert any(len(set(draws[i : i + 4])) > 1 for i in range(0, len(draws), 4))  # attempts are drawn differently
    keel.evaluate(run, env=own, num_tasks=1, record=True)
    assert sorted(path.name for path in (run / "evaluations").iterdir()) == [f"{newest}-2.json", f"{newest}.json"]


def test_checkpoints_models_and_other_tasks(run: Path) -> None:
    first, last = keel.load_run(run).checkpoints
    older = keel.evaluate(run, env=own, checkpoint=int(first.name), temperature=0.0, attempts=1)
    as_model = keel.evaluate(keel.load_run(run), env=own, model=first, temperature=0.0, attempts=1)
    assert older.metrics == as_model.metrics
    assert first.name in older.model
    bare = keel.evaluate(
        last / "weights", env=own, num_tasks=3, sets=["chat.system_message=full", "rollout.max_turns=2"]
    )
    assert (bare.num_tasks, bare.num_episodes) == (3, 3)
    elsewhere = keel.evaluate(run, env=keel.task_env(ROWS[:4], eval_share=1.0), num_tasks=2, attempts=2)
    assert elsewhere.success is None


def test_a_reward_that_fails_is_told_and_never_a_zero(run: Path) -> None:
    found = keel.evaluate(run, env=failing, num_tasks=6, attempts=2)
    away = {task.id for task in failing().tasks("eval") if task.data["answer"] in "abcdefghijklm"}
    assert 0 < found.failed == 2 * sum(task.task_id in away for task in found.tasks) < 12
    assert all(set(task.rewards) == {None} for task in found.tasks if task.task_id in away)
    assert found.reward.value >= 0.5


def test_what_cannot_be_evaluated_is_told(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"env"):
        keel.evaluate(run)  # its environment was an object, which config.toml can only name
    with pytest.raises(EvaluationError, match="holds out 6 tasks"):
        keel.evaluate(run, env=own, num_tasks=8)
    with pytest.raises(ConfigError, match="pass@k needs"):
        keel.evaluate(run, env=own, k=[8])
    with pytest.raises(ConfigError, match=r"eval\.num_tasks is needed"):
        keel.evaluate(keel.load_run(run).weights(), env=own)
    with pytest.raises(EvaluationError, match="give the run"):
        keel.evaluate(keel.load_run(run).weights(), env=own, num_tasks=1, record=True)


def test_no_secret_is_written(run: Path, tmp_path: Path) -> None:
    secret = ["env.options.instructions=hf_4f9aQ0zL1mN2bV3cX5" + "Zr7" * 6]
    with pytest.raises(SecretError, match=r"env\.options\.instructions"):
        keel.evaluate(
            run, env="CalculatorEnv", num_tasks=2, sets=["env.id=CalculatorEnv", *secret], json_file=tmp_path / "a"
        )
    assert not (tmp_path / "a").exists()


def test_the_command_tells_the_same(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "letters.py").write_text(
        "import keel\n"
        "ROWS = [{'question': f'Which letter, {c}?', 'answer': c} for c in 'abcdefghijklmnopqrstuvwxyz']\n"
        "env = keel.task_env(ROWS, reward='exact_match', eval_share=0.25)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    wanted = ["--env", "letters:env", "-n", "5", "--attempts", "4", "--k", "1,3", "--temperature", "0.8", "--seed", "7"]
    told = CliRunner().invoke(app, ["eval", str(run), *wanted, "--json", str(tmp_path / "out.json")])
    assert told.exit_code == 0, told.output
    expected = keel.evaluate(run, env="letters:env", num_tasks=5, attempts=4, k=[1, 3], temperature=0.8, seed=7)
    assert str(expected) in told.output
    assert json.loads((tmp_path / "out.json").read_text())["pass_at_k"].keys() == {"1", "3"}
    assert CliRunner().invoke(app, ["eval", str(run), *wanted[:-2], "--k", "one"]).exit_code == 2
