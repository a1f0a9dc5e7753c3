"""`keel report` and `keel compare` as a user gives them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest
from typer.testing import CliRunner

from keel.cli import app
from tests.hostile import SMALL


def keel(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_report_writes_beside_the_run_and_states_the_size(named_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(named_run("small"), run)
    done = keel("report", run)
    assert done.exit_code == 0
    size = (run / "report.html").stat().st_size / 1e6
    assert done.output == f"wrote {run / 'report.html'} ({size:.1f} MB)\n"
    assert keel("report", run, "--out", tmp_path / "elsewhere.html").exit_code == 0
    assert (tmp_path / "elsewhere.html").stat().st_size == (run / "report.html").stat().st_size


def test_compare_prints_pages_and_json(named_run, tmp_path):
    done = keel(
        "compare",
        named_run("running"),
        named_run("other_seed"),
        "--out",
        tmp_path / "c.html",
        "--json",
        tmp_path / "c.json",
    )
    assert done.exit_code == 0
    for words in (
        "seed: 0 | 1",
        "held-out success",
        "first step that differs: warm_start 0",
        "first token that differs: step 0",
    ):
        assert words in done.output
    data = json.loads((tmp_path / "c.json").read_text())
    assert data["schema_version"] == 1
    assert '"keel-data"' in (tmp_path / "c.html").read_text()


def test_what_runs_are_called_does_nothing_to_the_terminal(named_run, tmp_path):
    name = SMALL["ansi_cursor"].replace("/", "") + SMALL["forged_line"].replace("/", "")[:60]
    run = tmp_path / name
    shutil.copytree(named_run("small"), run)
    done = keel("compare", run, named_run("small"), "--json", tmp_path / "c.json")
    assert done.exit_code == 0
    assert "\x1b" not in done.output
    assert not [line for line in done.output.splitlines() if line.startswith("held-out success final: 100.0 %")]


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_directory_that_is_no_run_is_the_users_to_mend(command, tmp_path):
    arguments = [tmp_path] * (2 if command == "compare" else 1)
    done = subprocess.run(
        [sys.executable, "-m", "keel", command, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "is not a run directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_tells_its_address_and_ends_on_ctrl_c(named_run):
    command = [sys.executable, "-m", "keel", "report", str(named_run("small")), "--serve"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as served:
        line = served.stdout.readline()
        address = next(word for word in line.split() if word.startswith("http://127.0.0.1:"))
        with urllib.request.urlopen(f"{address}data.json", timeout=60) as answer:
            assert json.load(answer)["live"] is True
        served.send_signal(signal.SIGINT)
        assert served.wait(60) == 0
        assert served.stdout.read() == "stopped\n"
