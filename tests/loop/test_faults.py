"""Whose fault it is decides the exit code and whether there is a traceback; the text is safe to show and to keep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import keel
from keel import cli
from keel.learner.checkpoint import verify
from keel.models.tiny import build_tiny_model, build_tiny_tokenizer

SECRET = "planted-9f8e7d6c5b4a"
HERE = Path(__file__).parent
Done = subprocess.CompletedProcess

CONFIG = """
steps = 3
run_dir = "run"
env = {{ id = "fault_world:Fine" }}
model = {{ path = "{model}" }}
chat = {{ system_message = "none" }}
checkpoint = {{ every = 1 }}
batch = {{ max_tokens = 4096 }}
rollout = {{ groups_per_step = 2, group_size = 4, max_new_tokens = 4, max_turns = 1, max_sequence_tokens = 64 }}
engine = {{ slots = 8 }}
"""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build_tiny_model("gpt_oss", path, tokenizer=build_tiny_tokenizer(["Go."], style="harmony"), seed=0)
    return path


@pytest.fixture
def run_keel(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """`run_keel(*settings)` trains in `tmp_path`/run by keel's command line, in this process."""

    def run(*settings: str) -> Done:
        (tmp_path / "run.toml").write_text(CONFIG.format(model=model_path))
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(HERE)
        monkeypatch.setenv("PLANTED_API_KEY", SECRET)
        monkeypatch.setattr("sys.argv", ["keel", "train", "run.toml", *(f"--set={setting}" for setting in settings)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Done(sys.argv, ended.value.code or 0, out, err)

    return run


def status_of(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "status.json").read_text())


def assert_nothing_leaks(tmp_path: Path, done: Done) -> None:
    assert "\x1b" not in done.stdout + done.stderr
    assert "\x07" not in done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("setting", "code", "told"),
    [
        pytest.param(
            "env.id=fault_world:CannotBeMade",
            2,
            "environment 'fault_world:CannotBeMade' could not be made: ValueError: no data at "
            "\\x1b]52;c;cm0gLXJm\\x07\\x1b[31m with [secret PLANTED_API_KEY] (fault_world.py:",
            id="environment",
        ),
        pytest.param(
            "env.id=fault_world:not_an_environment",
            2,
            "made a str; it must make a keel.envs.base.Env",
            id="late_plugin",
        ),
        pytest.param(
            "env.id=fault_world:AlwaysFails",
            1,
            "all 8 episodes failed; the first: env_error: step() raised",
            id="world",
        ),
    ],
)
def test_a_fault_that_explains_itself_has_no_traceback(run_keel, tmp_path, setting, code, told):
    done = run_keel(setting)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert status_of(tmp_path)["state"] == "failed"
    assert_nothing_leaks(tmp_path, done)


@pytest.mark.parametrize("path", [".", "run.toml"])
def test_a_model_path_that_is_no_model_is_told_before_anything_is_written(run_keel, tmp_path, path):
    done = run_keel(f"model.path={path}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("model.path")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_fault_of_code_is_shown_where_it_arose(run_keel, tmp_path):
    done = run_keel("algo.loss=fault_world:divides_by_zero")
    assert done.returncode == 1
    assert "in divides_by_zero" in done.stderr
    assert "ZeroDivisionError: \\x1b]52;" in done.stderr
    assert status_of(tmp_path)["reason"].endswith("with [secret PLANTED_API_KEY]")
    assert_nothing_leaks(tmp_path, done)


def test_a_key_is_in_no_file_of_a_run(run_keel, tmp_path):
    done = run_keel("env.id=fault_world:Leaks", "steps=1", "rollout.groups_per_step=8", "eval.num_tasks=4")
    assert done.returncode == 0, done.stderr
    assert_nothing_leaks(tmp_path, done)
    told = (tmp_path / "run" / "trajectories" / "000000.jsonl").read_text()
    assert '"content": "Use [secret PLANTED_API_KEY]."' in told
    assert "401 for [secret PLANTED_API_KEY]" in told


def test_a_config_with_a_key_is_refused_before_anything_is_written(run_keel, tmp_path):
    done = run_keel(f"env.options={{api_key = '{SECRET}'}}", "env.id=fault_world:Keyed")
    assert done.returncode == 2
    assert "env.options.api_key looks like a secret" in done.stderr
    assert SECRET not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_place_of_any_fault_can_be_asked_for(run_keel, monkeypatch):
    monkeypatch.setenv("KEEL_DEBUG", "1")
    assert "in _make" in run_keel("env.id=fault_world:not_an_environment").stderr


def test_out_of_memory_names_phase_tokens_and_option(model_path, tmp_path):
    """The system refuses 3 of 4 GiB (a real limit on the address space) in the second step's gradient."""
    (tmp_path / "run.toml").write_text(CONFIG.format(model=model_path))
    source = Path(keel.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (source, HERE)))}
    sets = ["--set=algo.loss=fault_world:takes_too_much", "--set=learner.recompute_every=0", "--set=num_threads=1"]
    command = [sys.executable, "-m", "keel", "train", "run.toml", *sets]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    reason = status_of(tmp_path)["reason"]
    assert status_of(tmp_path)["state"] == "failed"
    assert "out of memory while computing the gradient at reinforcement step 2 of 3 (" in reason
    assert "tokens in the largest micro-batch" in reason
    assert "4,096.0 MiB more could not be had" in reason
    assert "model.gradient_checkpointing true (is False); batch.max_tokens lower (is 4096)" in reason
    assert reason.partition(": ")[2] in done.stderr
    assert verify(tmp_path / "run" / "checkpoints" / "000001") == 1
    assert "to go on: keel resume run" in done.stdout
