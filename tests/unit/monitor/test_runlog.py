"""A run directory is never overwritten, never shared, and after a kill holds each row and record once."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from keel import config_load
from keel.config import TrainConfig
from keel.monitor import RunLog, environment, success_metrics
from keel.monitor.rows import RunDirectoryError, read_rows
from keel.monitor.rules import Alarm


def config_for(tmp_path, **values):
    return TrainConfig.model_validate({"run_dir": str(tmp_path / "run"), "steps": 6, "log": {"live": "off"}, **values})


def record(run, step):
    (run.paths.steps / f"{step:06d}.safetensors").write_bytes(b"s")
    (run.paths.trajectories / f"{step:06d}.jsonl").write_text("{}\n")


def do_steps(run, start, stop):
    for step in range(start, stop):
        record(run, step)
        run.log_step(step, {"reward/mean": step / 7, "policy/loss": math.nan if step == 3 else 0.5})


def rows_of(run):
    return [{key: value for key, value in row.items() if key != "unix_s"} for row in read_rows(run.paths.metrics)]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_run_leaves_the_files_of_the_contract(tmp_path, capsys):
    config = config_for(tmp_path)
    with RunLog.open(config) as run:
        with run.stage("evaluation", 1):
            run.log_eval("initial", success_metrics(3, 12), step=0)
        with run.stage("reinforcement", 6):
            do_steps(run, 0, 6)
    root = tmp_path / "run"
    assert set(names(root)) - {".lock"} == {
        "checkpoints",
        "config.toml",
        "environment.json",
        "metrics.jsonl",
        "status.json",
        "steps",
        "summary.json",
        "trajectories",
    }
    assert config_load.load(root / "config.toml") == config
    status = json.loads((root / "status.json").read_text())
    assert (status["state"], status["pid"], status["steps_done"]) == ("completed", os.getpid(), {"reinforcement": 6})
    summary = json.loads((root / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["eval"]["initial"]["success"] == 0.25
    assert set(summary["seconds"]) == {"evaluation", "reinforcement"}
    rows = read_rows(root / "metrics.jsonl")
    assert [(row["kind"], row["step"]) for row in rows] == [("eval", 0), *(("step", step) for step in range(6))]
    assert rows[0]["eval/num_tasks"] == 12
    assert rows[4]["policy/loss"] is None
    assert rows[4]["not_finite"] == {"policy/loss": "nan"}
    assert "eval initial: success 25.0 %" in capsys.readouterr().out


def test_a_killed_and_resumed_run_has_the_rows_of_the_undisturbed_one(tmp_path):
    with RunLog.open(config_for(tmp_path / "calm")) as calm:
        calm.log_step(0, {"policy/loss": 2.0}, stage="warm_start")
        calm.log_eval("after_warm_start", {"success": 0.5}, step=0)
        do_steps(calm, 0, 6)

    killed = RunLog.open(config_for(tmp_path / "killed"))
    killed.log_step(0, {"policy/loss": 2.0}, stage="warm_start")
    killed.log_eval("after_warm_start", {"success": 0.5}, step=0)
    do_steps(killed, 0, 3)
    state = json.loads(json.dumps(killed.state()))  # as a checkpoint keeps it
    do_steps(killed, 3, 5)
    killed.log_eval("later", {"success": 0.9}, step=4)
    with killed.paths.metrics.open("a") as file:
        file.write('{"kind": "step", "st')  # the kill comes in an append
    (killed.paths.steps / ".000005.safetensors.tmp").write_bytes(b"")
    killed._held.close()  # what the operating system does for a dead process

    with RunLog.resume(tmp_path / "killed" / "run") as resumed:
        resumed.restore(state)
        assert names(resumed.paths.steps) == [f"{step:06d}.safetensors" for step in range(3)]
        assert names(resumed.paths.trajectories) == [f"{step:06d}.jsonl" for step in range(3)]
        do_steps(resumed, 3, 6)
        assert resumed.close().eval == {"after_warm_start": {"step": 0, "success": 0.5}}
    assert rows_of(resumed) == rows_of(calm)
    assert [row["train_step"] for row in rows_of(resumed)] == [1, 1, 2, 3, 4, 5, 6, 7]  # eval after the warm start
    assert names(resumed.paths.steps) == names(calm.paths.steps)


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    killed = RunLog.open(config_for(tmp_path))
    do_steps(killed, 0, 2)
    killed._held.close()
    with RunLog.resume(tmp_path / "run") as resumed:
        resumed.restore(None)
        assert read_rows(resumed.paths.metrics) == []
        assert names(resumed.paths.steps) == []


def test_lost_rows_are_not_passed_over(tmp_path):
    run = RunLog.open(config_for(tmp_path))
    do_steps(run, 0, 2)
    state = run.state()
    run._held.close()
    run.paths.metrics.write_text("")
    with RunLog.resume(tmp_path / "run") as resumed, pytest.raises(RunDirectoryError, match="rows were lost"):
        resumed.restore(state)


def test_a_row_is_never_doubled(tmp_path):
    with RunLog.open(config_for(tmp_path)) as run:
        do_steps(run, 0, 2)
        run.log_step(0, {}, stage="warm_start")
        with pytest.raises(RunDirectoryError, match="never doubled"):
            run.log_step(1, {})


def test_a_run_never_overwrites_another(tmp_path):
    RunLog.open(config_for(tmp_path)).close()
    with pytest.raises(RunDirectoryError, match=r"not empty.*keel resume"):
        RunLog.open(config_for(tmp_path))


def test_a_run_directory_that_cannot_be_is_told_with_its_reason(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RunDirectoryError, match=r"is a file; choose another"):
        RunLog.open(config_for(tmp_path, run_dir=str(tmp_path / "file")))
    with pytest.raises(RunDirectoryError, match=r"cannot be made: .*Not a directory.*choose another"):
        RunLog.open(config_for(tmp_path, run_dir=str(tmp_path / "file" / "run")))
    with pytest.raises(RunDirectoryError, match=r"holds no run; choose another with --set run_dir=...$"):
        RunLog.open(config_for(tmp_path, run_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_unnamed_runs_get_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [RunLog.open(config_for(tmp_path, run_dir="", name="sums")).close().run_dir for _ in range(3)]
    assert len(set(runs)) == 3
    assert all(run.startswith("runs/") and "-sums" in run for run in runs)


def test_two_processes_cannot_hold_one_run(tmp_path):
    code = "import pathlib, sys; from keel.monitor import RunLog; RunLog.resume(pathlib.Path(sys.argv[1]))"
    with RunLog.open(config_for(tmp_path)):
        command = [sys.executable, "-c", code, str(tmp_path / "run")]
        other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert other.returncode != 0
    assert "in use by a running process" in other.stderr


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        RunLog.resume(tmp_path)


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [(KeyboardInterrupt(), "interrupted", "keyboard"), (ValueError("bad [red]"), "failed", "ValueError: bad [red]")],
)
def test_how_a_run_ended_is_recorded(tmp_path, error, state, reason):
    with pytest.raises(type(error)), RunLog.open(config_for(tmp_path)) as run, run.stage("reinforcement", 6):
        raise error
    for name in ("status.json", "summary.json"):
        found = json.loads((tmp_path / "run" / name).read_text())
        assert found["state"] == state
        assert reason in found["reason"]


def test_another_machine_is_warned_about(tmp_path):
    run = RunLog.open(config_for(tmp_path))
    assert run.note_environment(threads=2, device="cpu") == []
    run._held.close()
    with RunLog.resume(tmp_path / "run") as resumed:
        assert resumed.note_environment(threads=2, device="cpu") == []
        with pytest.warns(UserWarning, match="threads was 2, is 1"):
            assert resumed.note_environment(threads=1, device="cpu") == ["threads was 2, is 1"]
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert recorded["threads"] == 2
    assert recorded["packages"]["transformers"]
    assert [entry["changes"] for entry in recorded["resumed"]] == [[], ["threads was 2, is 1"]]


@pytest.mark.parametrize("fact", ["packages.torch", "packages.transformers", "variables.ONEDNN_MAX_CPU_ISA"])
def test_what_decides_bits_is_recorded_and_compared(monkeypatch, fact):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    section, name = fact.split(".")
    before, now = environment.collect_environment(), environment.collect_environment()
    now[section][name] += " of another kind"
    assert [line.partition(" ")[0] for line in environment.differences(before, now)] == [fact]


def test_seconds_of_a_stage_inside_another_are_its_own(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("keel.monitor.runlog.time.monotonic", lambda: now[0])
    with RunLog.open(config_for(tmp_path)) as run:
        now[0] += 1
        with run.stage("reinforcement", 6):
            now[0] += 10
            with run.stage("eval", 1):
                now[0] += 100
                assert json.loads(run.paths.status.read_text())["stage"] == "eval"
            assert json.loads(run.paths.status.read_text())["stage"] == "reinforcement"
            now[0] += 1000
        now[0] += 10000
        assert run.close().seconds == {"reinforcement": 1010.0, "eval": 100.0}


def test_seconds_add_up_over_a_resume(tmp_path):
    run = RunLog.open(config_for(tmp_path))
    run._held.close()
    with RunLog.resume(tmp_path / "run") as resumed:
        resumed.restore({"num_rows": 0, "seconds": {"reinforcement": 100.0}, "last_step": {}, "num_steps": {}})
        with resumed.stage("reinforcement", 6):
            pass
        assert resumed.close().seconds["reinforcement"] >= 100.0


def test_nothing_secret_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    RunLog.open(config_for(tmp_path)).close()
    for path in (tmp_path / "run").iterdir():
        if path.is_file():
            assert "hunter2" not in path.read_text()
    import platform

    assert platform.node() not in (tmp_path / "run" / "environment.json").read_text().split('"')


def test_alarms_are_rows_and_are_counted(tmp_path, capsys):
    """A kill after an alarm takes back what the checkpoint does not know; nothing in its text is markup or code."""
    warning = Alarm("no_signal", "warn", "[bold]only 1 of 40\x1b[31m groups", 2)
    with RunLog.open(config_for(tmp_path)) as run:
        with run.stage("reinforcement", 6):
            do_steps(run, 0, 3)
            run.log_alarm(warning, step=2)
            state = run.state()
            do_steps(run, 3, 4)
            run.log_alarm(Alarm("not_finite", "skip", "loss is nan", 3), step=3)
        row = rows_of(run)[3]
        run.restore(state)
        do_steps(run, 3, 4)
        run.log_alarm(warning, step=3)
        summary = run.close()
    assert row == {
        "schema_version": 1,
        "kind": "alarm",
        "stage": "reinforcement",
        "step": 2,
        "train_step": 3,
        "rule": "no_signal",
        "severity": "warn",
        "text": warning.text,
        "first_step": 2,
    }
    assert summary.alarms == {"no_signal": 2}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["alarms"] == {"no_signal": 2}
    assert [row["kind"] for row in rows_of(run)] == ["step"] * 3 + ["alarm", "step", "alarm"]
    shown = capsys.readouterr().out
    assert "alarm no_signal (warn) at reinforcement step 2: [bold]only 1 of 40\\x1b[31m groups" in shown
    assert "\x1b" not in shown
