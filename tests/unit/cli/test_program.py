"""The command line in real processes: exit codes, messages without tracebacks, and nothing slow for help."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import keel
from keel import config_load
from keel.cli import program
from keel.config import TrainConfig
from keel.config_docs import as_markdown
from keel.monitor.summary import RunSummary
from keel.plugins import PluginError
from keel.rollouts.collector import RolloutError


def run_keel(*arguments, cwd=None):
    source = str(Path(keel.__file__).parents[1])  # the tree under test, installed or not
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "PYTHONPATH": source}
    command = [sys.executable, "-m", "keel", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)


def test_version():
    assert run_keel("--version").stdout == f"{keel.__version__}\n"


def test_help_needs_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from keel.cli import app; "
        "result = CliRunner().invoke(app, ['train', '--help']); assert result.exit_code == 0, result.output; "
        "assert '--dry-run' in result.output; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_wrong_config_exits_2_and_says_what_got_fix(tmp_path):
    (tmp_path / "run.toml").write_text("[rollout]\ngroup_sise = 16\n")
    done = run_keel("train", "run.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "run.toml:2: unknown option 'group_sise' in [rollout]\n"
        "    got: 16 (a whole number)\n"
        "    fix: did you mean 'group_size'?\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.toml"], "none.toml: cannot be read"),
        (["train", "empty.toml"], "env.id is needed and not given"),
        (["train", "empty.toml", "--set", "steps=x"], "--set steps=x: steps has a value it does not take"),
        (["eval", "empty.toml"], "eval.num_tasks is needed and not given"),
        (["eval", "none"], "no directory none; if it is a model of the hub, say what it is to do: env (--env"),
        (["rollout", "empty.toml", "--model", "./none", "--set", "env.id=CalculatorEnv"], "no directory ./none"),
        (["resume", "."], "not a run directory"),
        (["quickstart", "--seed", "-1"], "--seed"),
        (["tiny-model", "--out", "."], "not empty"),
        (["tiny-model", "--out", "new", "--preset", "gpt-oss"], "known: gpt_oss, qwen3, qwen3_moe"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_the_users_faults_exit_2_and_are_told(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "empty.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["keel", *arguments])
    with pytest.raises(SystemExit) as caught:
        program.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_printed_config_is_an_input(tmp_path):
    (tmp_path / "run.toml").write_text(run_keel("config", "--set", "optim.lr=0.5").stdout)
    config = config_load.load(tmp_path / "run.toml")
    assert config.model_dump() == TrainConfig.model_validate({"optim": {"lr": 0.5}}).model_dump()


def test_the_reference_page_can_be_printed():
    assert run_keel("config", "--markdown").stdout == as_markdown()


@pytest.mark.parametrize(("state", "code"), [("completed", 0), ("stopped", 4), ("interrupted", 130)])
def test_a_stopped_run_does_not_exit_as_done(monkeypatch, tmp_path, state, code):
    final = {"step": 6, "success": 0.75, "success_low": 0.5, "success_high": 0.875, "num_tasks": 512.0}
    found = {"eval": {"final": final}, "alarms": {"no_signal": 2}, "seconds": {"eval": 65.0}}
    summary = RunSummary(run_dir="runs/x", state=state, reason="loss is nan", **found)
    monkeypatch.setattr("keel.loop.resume", lambda _: summary)
    result = CliRunner().invoke(program.app, ["resume", str(tmp_path)])
    assert result.exit_code == code
    assert result.output == (
        "held-out success final: 75.0 % (95 % interval 50.0 % to 87.5 %, 512 tasks)\n"
        f"time: eval 1 min 05 s\nalarms: no_signal 2\n{state}: runs/x (loss is nan)\n"
    )


def test_a_run_without_successes_ends_with_its_rewards_and_its_report(monkeypatch, tmp_path):
    (tmp_path / "report.html").write_text("")
    summary = RunSummary(run_dir=str(tmp_path), state="completed", eval={"final": {"reward": 0.5, "num_tasks": 8.0}})
    monkeypatch.setattr("keel.loop.resume", lambda _: summary)
    shown = CliRunner().invoke(program.app, ["resume", str(tmp_path)]).output
    assert shown == f"held-out reward final: 0.5 (8 tasks)\ncompleted: {tmp_path}\nreport: {tmp_path}/report.html\n"


def test_every_command_is_told_in_one_whole_line():
    lines = CliRunner().invoke(program.app, ["-h"]).output.partition("Commands:")[2].partition("Exit codes")[0]
    told = dict(line.strip().split(maxsplit=1) for line in lines.splitlines() if line.strip())
    assert list(told)[:5] == ["quickstart", "new", "rollout", "preflight", "train"]
    assert all(text.endswith((".", "?")) and not text.endswith("...") for text in told.values())
    assert len(told) == len(program.app.registered_commands) + len(program.app.registered_groups)


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "run", "--json"), ("rollout", "run.toml", "--json"), ("report", "run", "--out"),
        ("compare", "a", "b", "--out"), ("compare", "a", "b", "--json"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, arguments):
    """None of these runs exists: the file is refused before anything is looked at."""
    for file, why in ((tmp_path / "none" / "x", "make it first"), (tmp_path, "is a directory; name a file")):
        result = CliRunner().invoke(program.app, [*arguments, str(file)])
        assert result.exit_code == 2
        assert why in " ".join(result.output.split())


def test_an_interruption_exits_130(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "app", interrupted)
    with pytest.raises(SystemExit) as caught:
        program.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_has_the_exit_codes_of_the_page_about_the_loop():
    shown = CliRunner().invoke(program.app, ["--help"]).output.partition("Exit codes:")[2].splitlines()
    told = {line.split()[0]: " ".join(line.split()[1:]) for line in shown if line.strip()[:1].isdigit()}
    page = (Path(keel.__file__).parents[1] / "docs" / "loop.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.partition("| exit code |")[2].splitlines()[2:]]
    documented = {row[0]: row[1] for row in rows[: len(told)]}
    assert list(told) == list(documented) == ["0", "1", "2", "3", "4", "130"]
    assert all(documented[code].startswith(text.partition(" (")[0][:40]) for code, text in told.items())


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (PluginError("raised late"), 2, "raised late\n"),
        (RolloutError("all 8 episodes failed\x1b[31m"), 1, "all 8 episodes failed\\x1b[31m\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "not permitted: "),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "no space left: "),
        (MemoryError(), 1, "out of memory: "),
        (KeyError("a fault of Keel's"), 1, "Traceback (most recent call last):\n"),
    ],
    ids=["plugin", "rollout", "permission", "disk", "memory", "bug"],
)
def test_every_error_is_told_at_the_border(monkeypatch, capsys, error, code, told):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(program, "app", fails)
    with pytest.raises(SystemExit) as caught:
        program.main()
    assert caught.value.code == code
    shown = capsys.readouterr().err
    assert shown.startswith(told)
    assert ("Traceback" in shown) == told.startswith("Traceback")
    assert "\x1b" not in shown


def test_a_tiny_model_is_an_ordinary_checkpoint_and_can_be_planned_for(tmp_path):
    done = run_keel("tiny-model", "--preset", "qwen3_moe", "--out", "model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "qwen3_moe"
    sets = ["--set", "model.path=model", "--set", "env.id=CalculatorEnv", "--set", "rollout.max_sequence_tokens=512"]
    (tmp_path / "run.toml").write_text("")
    done = run_keel("train", "run.toml", "--dry-run", *sets, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "qwen3_moe" in done.stdout
    assert "256 episodes, at most 131,072 tokens" in done.stdout
    assert not (tmp_path / "runs").exists()
