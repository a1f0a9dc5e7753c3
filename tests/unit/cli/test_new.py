"""`keel new` writes what it says, where it says, over nothing; what it wrote passes its own tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import keel
from keel import config_load, plugins
from keel.cli import app

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n), "level": "easy"} for n in range(60)]
FILES = {"README.md", "env.py", "run.toml", "test_env.py"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def new(*arguments):
    return CliRunner().invoke(app, ["new", *map(str, arguments)])


def write(rows, name="mine.jsonl"):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def own_tests(directory):
    environment = {**os.environ, "PYTHONPATH": str(Path(keel.__file__).parents[1])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", directory]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def config_of(directory, monkeypatch):
    """The config as a command in the directory reads it, plug-ins and all."""
    monkeypatch.chdir(directory)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.delitem(sys.modules, "env", raising=False)
    return config_load.load("run.toml")


def test_an_environment_of_ones_own(here, monkeypatch):
    result = new("my-agent")
    assert result.exit_code == 0, result.output
    assert {path.name for path in Path("my-agent").iterdir()} == {*FILES, "tasks.jsonl"}
    assert "cd my-agent && keel rollout run.toml" in result.output
    config = config_of("my-agent", monkeypatch)
    assert (config.env.id, config.model.tiny.preset, config.name) == ("env:MyAgentEnv", "gpt_oss", "my-agent")
    assert config.warm_start.steps > 0
    assert len(plugins.resolve(config.env.id, "keel.envs")().tasks("eval")) == config.eval.num_tasks


def test_over_rows_with_answers(here, monkeypatch):
    result = new("mine", "--data", write(ROWS))
    assert result.exit_code == 0, result.output
    assert Path("mine/rows.jsonl").read_text() == Path("mine.jsonl").read_text()
    text = Path("mine/env.py").read_text()
    assert 'prompt="question"' in text
    assert 'reward="exact_match"' in text
    config = config_of("mine", monkeypatch)
    assert config.warm_start.steps > 0
    assert 0 < config.eval.num_tasks <= 60
    assert config.rollout.max_sequence_tokens >= len("What is 59 + 59?") + config.rollout.max_new_tokens


def test_over_rows_without_answers(here, monkeypatch):
    """Nothing to compare with and nothing to demonstrate: a reward to be written, and no warm start."""
    result = new("open", "--data", write([{"prompt": f"Write about {n}."} for n in range(30)]))
    assert result.exit_code == 0, result.output
    assert "def reward(trajectory, task):" in Path("open/env.py").read_text()
    assert config_of("open", monkeypatch).warm_start.steps == 0


@pytest.mark.parametrize("arguments", [[], ["--data", "mine.jsonl"], ["--data", "mine.jsonl", "--answer", "level"]])
def test_what_it_wrote_passes_its_own_tests(here, arguments):
    write(ROWS)
    assert new("it", *arguments).exit_code == 0
    done = own_tests("it")
    assert done.returncode == 0, done.stdout


def test_hostile_names_are_only_text(here):
    """Columns go into Python source as literals, whatever they spell, and the name of a file not at all."""
    column = 'q"); import os; os.mkdir("pwned"); ("'
    data = write([{column: f"{n}?", "ans\\wer $name": str(n)} for n in range(30)], 'r.json"l")\nraise SystemExit(("')
    result = new("it", "--data", data, "--prompt", column, "--answer", "ans\\wer $name")
    assert result.exit_code == 0, result.output
    done = own_tests("it")
    assert done.returncode == 0, done.stdout
    assert not list(here.rglob("pwned"))


def test_a_model_is_named_and_found_from_anywhere(here, monkeypatch):
    Path("weights").mkdir()
    assert new("it", "--model", "weights").exit_code == 0
    assert new("hub", "--model", "Qwen/Qwen3-0.6B").exit_code == 0
    config = tomllib.loads(Path("it/run.toml").read_text())
    assert config["model"]["path"] == str(here / "weights")
    assert "warm_start" not in config
    assert tomllib.loads(Path("hub/run.toml").read_text())["model"]["path"] == "Qwen/Qwen3-0.6B"
    assert config_of("hub", monkeypatch).optim.lr < 1e-5


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", "/tmp/x", "-x", "9a", "a b", "a\nb", "a.b", "é", "$HOME", "a" * 65, "~"]
)
def test_a_name_that_is_none_is_refused(here, name):
    result = CliRunner().invoke(app, ["new", "--", name])
    assert result.exit_code == 2
    assert not list(here.iterdir())
    assert "Traceback" not in result.output


@pytest.mark.parametrize("kind", ["directory", "file", "dead link"])
def test_what_is_there_is_left_as_it_is(here, kind):
    there = Path("there")
    if kind == "directory":
        there.mkdir()
    elif kind == "file":
        there.write_text("mine")
    else:
        there.symlink_to("nowhere")
    result = new("there")
    assert result.exit_code == 2
    assert "left as it is" in result.output.replace("\n", " ").replace("  ", " ")
    assert [path.name for path in here.iterdir()] == ["there"]
    assert not there.is_dir() or not list(there.iterdir())


@pytest.mark.parametrize(
    ("rows", "arguments"),
    [
        ([{"q": "?"}], []),
        ([{"question": "?"}], ["--prompt", "{nothing}"]),
        ([{"question": "?"}], ["--answer", "gold"]),
        ([{"question": "?", "answer": "a"}, {"question": "!"}], []),
        ([], []),
    ],
)
def test_rows_that_cannot_be_tasks_leave_nothing(here, rows, arguments):
    result = new("it", "--data", write(rows), *arguments)
    assert result.exit_code != 0
    assert not Path("it").exists()


def test_columns_that_are_not_the_usual_ones_are_asked_for_in_the_commands_words(here):
    result = new("sums", "--data", write([{"my task": "1 + 1", "gold": "2"}]))
    assert result.exit_code == 2
    assert "--prompt: mine.jsonl has none of the columns prompt, messages, question (it has: my task, gold)" in (
        " ".join(result.output.split())
    )
    result = new("sums", "--data", "mine.jsonl", "--prompt", "my task")
    assert result.exit_code == 0, result.output
    assert "the reward in sums/env.py is a place to begin" in result.output
    assert "--answer" not in new("more", "--data", "mine.jsonl", "--prompt", "my task", "--answer", "gold").output


def test_a_model_that_is_not_there_is_refused_at_once(here):
    result = new("sums", "--model", "./none")
    assert result.exit_code == 2
    assert "there is no directory ./none" in result.output
    assert not Path("sums").exists()


def test_nothing_is_left_of_a_directory_that_could_not_be_written(here, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    assert new("it").exit_code != 0
    assert not list(here.iterdir())
