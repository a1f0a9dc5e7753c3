"""What `keel resume` does with runs that ended in other ways than by a kill, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keel import config_load
from keel.config import TrainConfig
from keel.learner.checkpoint import CheckpointError, checkpoint_to_resume, prune, writing
from keel.loop import resume, train
from keel.monitor import directory
from keel.monitor.rows import RunDirectoryError
from keel.monitor.rules import Monitor
from keel.monitor.runlog import RunLog


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def damage(file: Path) -> None:
    """One bit in the middle turns over; the size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def write_checkpoints(path: Path, *steps: int) -> None:
    for step in steps:
        with writing(path / f"{step:06d}", step) as unfinished:
            (unfinished / "content").write_text(f"weights after {step} steps")


def test_interrupted_damaged_and_resumed(run, same_as_undisturbed):
    """Ctrl-C, twice, in the midst of a rollout is recorded; the newest checkpoint is found damaged; the run still ends
    as the undisturbed one, and once it has, resuming it changes nothing."""
    aim = {"at": "keel.envs.tools:Tool.call", "call": 2, "armed_by": ["keel.loop:train_step", 20]}
    assert run.go({**aim, "how": "at once"}) == 130
    assert "Traceback" not in run.output
    status, summary = run.json("status.json"), run.json("summary.json")
    assert (status["state"], summary["state"]) == ("interrupted", "interrupted")
    assert "keyboard" in status["reason"]
    assert run.checkpoints() == ["000016", "000018"]

    damage(run.path / "checkpoints" / "000018" / "learner.safetensors")
    run.finish()
    assert "checkpoints/000018: the bytes of learner.safetensors have changed" in run.output
    same_as_undisturbed(run)

    before = files(run.path)
    run.finish()
    assert "completed" in run.output
    assert "nothing was done" in run.output
    assert files(run.path) == before


def test_a_directory_in_use_is_left_alone(tmp_path):
    config = TrainConfig(run_dir=str(tmp_path / "run"))
    with RunLog.open(config):
        before = files(tmp_path)
        with pytest.raises(RunDirectoryError, match="in use by a running process"):
            resume(tmp_path / "run")
        assert files(tmp_path) == before


@pytest.mark.parametrize("left", [(), (".lock",), (".lock", "environment.json", ".config.toml.tmp")])
def test_what_was_killed_before_it_was_a_run_is_begun_anew(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("")
    directory.create(str(tmp_path), "")
    with RunLog.open(TrainConfig(run_dir=str(tmp_path))) as run:
        assert config_load.load(run.paths.config).run_dir == str(tmp_path)


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "steps/000000.safetensors", "notes.txt", "steps"])
def test_whatever_else_a_directory_holds_is_not_overwritten(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(RunDirectoryError, match="is not empty"):
        directory.create(str(tmp_path), "")


def test_damaged_checkpoints_neither_count_nor_come_back(tmp_path):
    """With room for two, a damaged newest checkpoint must not push the last whole one out."""
    write_checkpoints(tmp_path, 2, 4, 6)
    damage(tmp_path / "000006" / "content")
    (tmp_path / "000004" / "manifest.json").write_text("{")
    assert checkpoint_to_resume(tmp_path) == tmp_path / "000002"
    write_checkpoints(tmp_path, 3)
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002", "000003"]
    assert checkpoint_to_resume(tmp_path) == tmp_path / "000003"


def test_a_run_is_not_begun_anew_because_all_checkpoints_are_damaged(tmp_path):
    assert checkpoint_to_resume(tmp_path / "none") is None
    write_checkpoints(tmp_path, 2, 4)
    for step in (2, 4):
        damage(tmp_path / f"00000{step}" / "content")
    before = files(tmp_path)
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is whole"):
        checkpoint_to_resume(tmp_path)
    assert files(tmp_path) == before


def test_a_stopped_run_stays_stopped_until_it_is_given_more_patience():
    state = {"skips": 3, "skips_in_a_row": 3}
    for max_skips, stops in ((3, True), (4, False)):
        monitor = Monitor(max_skips)
        assert not monitor.standing().stops
        monitor.restore(state)
        assert monitor.standing().stops is stops


@pytest.mark.soak
def test_killed_between_its_stop_and_its_summary(run):
    """The monitor's stop is in the checkpoint: the resumed run does not train on."""
    run.sets = ("algo.loss=kill_world:broken", "monitor.max_skips=2")
    run.die({"at": "keel.monitor.runlog:RunLog.close"})
    before = run.rows()
    assert run.go() == 4, run.output
    assert run.json("status.json")["state"] == "stopped"
    assert run.rows() == before
    steps = [row["step"] for row in before if row["kind"] == "step" and row["stage"] == "reinforcement"]
    assert steps == [0, 1]


@pytest.mark.soak
def test_another_number_of_threads_is_warned_about(run):
    run.die({"at": "keel.loop:write_records", "call": 19})
    run.set("num_threads = 1", "num_threads = 2")
    run.finish()
    assert "threads was 1, is 2" in run.output
    assert run.json("environment.json")["resumed"][-1]["changes"] == ["threads was 1, is 2"]


@pytest.mark.soak
def test_a_completed_run_can_be_given_more_steps(run):
    run.finish()
    run.set("steps = 6 ", "steps = 8 ")
    run.finish()
    steps = [row["step"] for row in run.rows() if row["kind"] == "step" and row["stage"] == "reinforcement"]
    assert steps == list(range(8))
    assert run.json("summary.json")["eval"]["final"]["step"] == 16 + 8


def test_a_run_of_warm_start_alone_can_be_given_reinforcement(tmp_path, make_config):
    """Its checkpoint knows nothing of where reinforcement's tasks are: that stage begins fresh, and it says so."""
    config = make_config(
        tmp_path / "run",
        steps=0,
        warm_start={"steps": 2, "demonstrations_per_step": 4},
        eval={"num_tasks": 0},
        checkpoint={"every": 1},
    )
    assert train(config).state == "completed"
    file = tmp_path / "run" / "config.toml"
    text = file.read_text(encoding="utf-8")
    assert text.count("\nsteps = 0 ") == 1
    file.write_text(text.replace("\nsteps = 0 ", "\nsteps = 2 "), encoding="utf-8")
    assert resume(tmp_path / "run").state == "completed"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [(row["stage"], row["step"]) for row in rows if row["kind"] == "step"]
    assert steps == [("warm_start", 0), ("warm_start", 1), ("reinforcement", 0), ("reinforcement", 1)]


IN_A_TOOL_CALL = {"at": "keel.envs.tools:Tool.call", "call": 2, "armed_by": ["keel.loop:train_step", 19]}
BEFORE_PUBLISH = {"at": "keel.build:Parts.publish", "call": 20}
IN_THE_RENAME = {"at": "pathlib:Path.rename", "match": "000018.unfinished'), PosixPath"}
WHILE_RANKS_SAVE = {"at": "keel.learner.group:LearnerGroup._answers", "armed_by": ["keel.build:Parts.save", 9]}


@pytest.mark.soak
@pytest.mark.parametrize(
    ("sets", "aim"),
    [
        pytest.param('engine.process="separate"', IN_A_TOOL_CALL, id="engine-in_a_tool_call"),
        pytest.param('engine.process="separate"', BEFORE_PUBLISH, id="engine-between_optimizer_and_publish"),
        pytest.param('engine.process="separate"', IN_THE_RENAME, id="engine-in_the_rename_of_a_checkpoint"),
        pytest.param("learner.ranks=2", IN_A_TOOL_CALL, id="ranks-in_a_tool_call"),
        pytest.param("learner.ranks=2", BEFORE_PUBLISH, id="ranks-between_optimizer_and_publish"),
        pytest.param("learner.ranks=2", WHILE_RANKS_SAVE, id="ranks-while_they_write_a_checkpoint"),
    ],
)
def test_several_processes(run, other_run, is_same, sets, aim):
    """The engine, or the learner's ranks, in processes of their own: none outlives the kill, the same bits follow."""
    run.sets = other_run.sets = (sets,)
    run.die(aim)
    run.finish()
    other_run.finish()
    is_same(run, other_run)
