"""A run directory is read whatever its state; a stranger's runs nothing."""

from __future__ import annotations

import dataclasses
import json
import pickle
import platform
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from keel.batch import pack
from keel.config import EnvConfig, LogConfig, TrainConfig
from keel.monitor.printable import printable
from keel.monitor.rows import RunDirectoryError, write_json
from keel.monitor.rules import Alarm
from keel.monitor.runlog import RunLog
from keel.monitor.summary import RunSummary
from keel.records import step_streams
from keel.rollouts.store import write_step_record, write_trajectories
from keel.runs import Run, load_record, load_run
from keel.types import Message, Task, Trajectory
from tests.hostile import HOSTILE


def write_run(path: Path, groups: list, *, close: bool = True, **config: object) -> RunLog:
    """Two steps, an evaluation and an alarm; step 1 has its records."""
    run = RunLog.open(TrainConfig(run_dir=str(path), log=LogConfig(live="off"), **config))
    run.log_eval("initial", {"success": 0.25, "success_low": 0.1, "success_high": 0.5, "num_tasks": 12.0}, step=0)
    for step in range(2):
        run.log_step(step, {"reward/mean": 0.5 + step, "policy/entropy": 2.0, "policy/loss": float("nan")})
    run.log_alarm(Alarm("no_signal", "warn", "few groups differ", first_step=0), step=1)
    batch = pack(groups, max_tokens=64)
    write_step_record(run.paths.steps / "000001.safetensors", step_streams(batch, []), {"step": 1, "stage": "x"})
    write_trajectories(run.paths.trajectories / "000001.jsonl", (t for group in groups for t in group.trajectories))
    if close:
        run.close()
    return run


@pytest.fixture(scope="module")
def groups(make_groups) -> list:
    """Three groups; the world spoilt an attempt in the middle of the second."""
    made = make_groups(3, 3)
    attempts = list(made[1].trajectories)
    attempts[1] = dataclasses.replace(attempts[1], status="env_error", error="lost")
    made[1] = dataclasses.replace(made[1], trajectories=tuple(attempts))
    return made


@pytest.fixture(scope="module")
def written(tmp_path_factory, groups) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    write_run(path, groups)
    return path


@pytest.fixture
def run(tmp_path, written) -> Run:
    """A copy of a whole run, to be damaged."""
    return load_run(shutil.copytree(written, tmp_path / "run"))


def test_a_whole_run_is_read_as_it_was_written(run):
    written = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert run.rows == written
    assert [row["kind"] for row in run.rows] == ["eval", "step", "step", "alarm"]
    assert [row["reward/mean"] for row in run.rows_of("step")] == [0.5, 1.5]
    assert run.evaluations[0] | {"unix_s": 0} == {
        "name": "initial", "train_step": 0, "step": 0, "unix_s": 0,
        "success": 0.25, "success_low": 0.1, "success_high": 0.5, "num_tasks": 12.0,
    }  # fmt: skip
    assert [(alarm["rule"], alarm["severity"]) for alarm in run.alarms] == [("no_signal", "warn")]
    assert run.state == "completed"
    assert run.summary is not None
    assert run.summary["steps"] == 2
    assert run.environment["python"] == platform.python_version()
    assert run.steps == [1]
    assert run.problems == []
    assert run.config == TrainConfig(run_dir=run.config.run_dir, log=LogConfig(live="off"))


def test_sequences_are_what_the_engine_saw_and_values_stand_at_their_token(run, groups):
    kept = [attempt for group in groups for attempt in group.kept]
    record = run.step(1)
    assert len(kept) == 8
    assert len(record.sequences) == 8
    assert record.step == 1
    for number, attempt in enumerate(kept):
        (view,) = record.of_trajectory(number)
        (segment,) = attempt.segments
        assert tuple(view.token_ids) == segment.token_ids
        assert view.segment == 0
        assert len(view.per_token("positions")) == len(segment.token_ids) == len(view.per_token("loss_mask"))
        drawn = [span.logprobs or (None,) * len(span) for span in segment.spans]
        expected = [value for values in drawn for value in values]
        found = view.per_token("rollout_logprobs")
        assert all(e is None or f == pytest.approx(e) for f, e in zip(found, expected, strict=True))
        mask = [span.origin == "policy" for span in segment.spans for _ in span.token_ids]
        assert view.per_token("loss_mask") == [None, *mask[1:]]
        assert view.per_token("positions") == [*range(len(segment) - 1), None]


def test_several_segments_of_a_trajectory_are_counted(tmp_path, make_groups):
    group = make_groups(1, 1)[0]
    (whole,) = group.trajectories
    double = dataclasses.replace(whole, segments=whole.segments * 2)
    write_run(tmp_path / "run", [dataclasses.replace(group, trajectories=(double,))])
    views = load_run(tmp_path / "run").step(1).of_trajectory(0)
    assert [(view.index, view.segment) for view in views] == [(0, 0), (1, 1)]


def test_trajectories_are_read_with_the_failed_ones(run, groups):
    found = run.trajectories(1)
    assert [(t.group_id, t.attempt, t.status) for t in found] == [
        (t.group_id, t.attempt, t.status) for group in groups for t in group.trajectories
    ]


def test_a_run_that_goes_on_is_told_from_one_that_crashed(tmp_path, groups):
    log = write_run(tmp_path / "run", groups, close=False)
    with log.stage("reinforcement", 9):
        going = load_run(tmp_path / "run")
        assert (going.state, going.is_running, going.summary) == ("running", True, None)
        status = (tmp_path / "run" / "status.json").read_text()
    log.close()
    assert load_run(tmp_path / "run").state == "completed"
    (tmp_path / "run" / "status.json").write_text(status)  # what a kill leaves
    (tmp_path / "run" / "summary.json").unlink()
    crashed = load_run(tmp_path / "run")
    assert (crashed.state, crashed.is_running, crashed.summary) == ("crashed", False, None)
    assert len(crashed.rows) == 4
    assert "crashed" in crashed._repr_html_()


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_torn_last_row_is_left_out_and_no_problem(run, cut):
    path = run.path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    torn = load_run(run.path)
    assert len(torn.rows) == 3
    assert torn.rows == [json.loads(line) for line in whole.splitlines()[:-1]]
    assert torn.problems == []


@pytest.mark.parametrize(
    "line",
    [b"{", b"\xff\xfe", b"5", b"[1]", b'"row"', b"null", b"", b'{"schema_version": 99}', b"[" * 100_000, b"9" * 5000],
    ids=lambda line: repr(line[:12]),
)
def test_a_damaged_row_costs_itself_alone_and_is_told_of(run, line):
    path = run.path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]))
    damaged = load_run(run.path)
    assert damaged.rows == [json.loads(line) for line in lines[:-1]]
    (problem,) = damaged.problems
    assert problem.startswith(f"{path}:3: ")


@pytest.mark.parametrize("name", ["status.json", "summary.json", "environment.json", "metrics.jsonl", "steps"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"schema_version": 2}'])
def test_any_file_may_be_missing_or_broken(run, name, content):
    path = run.path / name
    if path.is_dir():
        for item in path.iterdir():
            item.unlink()
        path.rmdir()
    else:
        path.unlink()
    if content is not None:
        path.write_bytes(content)
    read = load_run(run.path)
    found = (read.status, read.summary, read.environment, read.rows, read.steps, read.checkpoints, read.alarms)
    assert isinstance(read._repr_html_(), str)
    assert len(found) == 7
    assert len(read.rows) == (0 if name == "metrics.jsonl" else 4)
    assert read.status == ({} if name == "status.json" else run.status)
    assert read.trajectories(1) == run.trajectories(1)


def test_a_config_alone_is_a_run(tmp_path):
    (tmp_path / "config.toml").write_text("steps = 3\n")
    run = load_run(tmp_path)
    assert (run.config.steps, run.state, run.rows, run.steps, run.checkpoints) == (3, "unknown", [], [], [])
    assert run.summary is None
    assert run.problems == []
    assert run.name == tmp_path.name


def test_a_step_that_was_not_kept_is_told_with_those_that_were(run):
    with pytest.raises(RunDirectoryError, match=r"step 7 was not recorded.*1 steps from 1 to 1"):
        run.step(7)
    (run.path / "trajectories" / "000001.jsonl").unlink()
    assert run.steps == [1]
    with pytest.raises(RunDirectoryError, match="not recorded"):
        run.trajectories(1)


def test_recorded_evaluations_read_as_rows_and_a_broken_one_is_told_of(run):
    assert run.recorded_evaluations == []
    directory = run.path / "evaluations"
    directory.mkdir()
    wilson = {"value": 0.5, "low": 0.25, "high": 0.75, "num_tasks": 4}
    point = {"value": 1.0, "low": None, "high": None, "num_tasks": 4}
    whole = {"name": "000006", "attempts": 2, "success": wilson, "reward": point, "pass_at_k": {"2": wilson}}
    write_json(directory / "000006.json", {**whole, "tasks": [{"task_id": "a"}], "config": {"env": {}}})
    write_json(directory / "000007.json", {"name": 7, "success": 5, "reward": {}, "pass_at_k": [1]})
    (directory / "000008.json").write_text("{")
    again = load_run(run.path)
    first, second = again.recorded_evaluations
    names = {"success": 0.5, "success_low": 0.25, "success_high": 0.75, "reward": 1.0}
    passed = {"pass@2": 0.5, "pass@2_low": 0.25, "pass@2_high": 0.75}
    assert first == {"schema_version": 1, "name": "000006", "attempts": 2, **names, **passed}
    assert second == {"schema_version": 1, "name": 7, "success": 5}
    assert len(again.problems) == 1
    assert "000008.json" in again.problems[0]


@pytest.mark.parametrize(("name", "text"), [("missing", "not a directory"), ("empty", "config.toml")])
def test_what_is_no_run_is_refused(tmp_path, name, text):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunDirectoryError, match=text):
        load_run(tmp_path / name)


@pytest.mark.parametrize("text", ["steps = ", "stpes = 3", "steps = 'many'", "a = " + "[" * 5000])
def test_a_config_that_this_keel_cannot_read_costs_the_config_alone(run, text):
    (run.path / "config.toml").write_text(text)
    other = load_run(run.path)
    assert other.rows == run.rows
    assert other.config_text == text
    with pytest.raises(RunDirectoryError, match="the Keel that wrote it"):
        _ = other.config


def test_checkpoints_are_the_whole_ones_and_weights_are_found_by_step_name_or_path(run):
    for name, whole in (("000009", True), ("000010", True), ("000100.unfinished", True), ("000011", False)):
        (run.path / "checkpoints" / name).mkdir()
        if whole:
            (run.path / "checkpoints" / name / "manifest.json").write_text("{}")
    names = [path.name for path in run.checkpoints]
    assert names == ["000009", "000010"]
    first, last = (path / "weights" for path in run.checkpoints)
    assert run.weights() == run.weights(10) == run.weights("000010") == last
    assert run.weights(9) == run.weights(run.checkpoints[0]) == first
    with pytest.raises(RunDirectoryError, match=r"no checkpoint 000011; there are: 000009, 000010"):
        run.weights(11)


def test_weights_of_a_run_without_checkpoint_are_told(run):
    with pytest.raises(RunDirectoryError, match="no checkpoint yet"):
        run.weights()


def change(streams: dict, **changed: np.ndarray | None) -> dict:
    return {name: stream for name, stream in {**streams, **changed}.items() if stream is not None}


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"labels": None}, "no labels"),
        ({"cu_seqlens": None}, "no cu_seqlens"),
        ({"advantages": np.zeros(3)}, "advantages and input_ids differ in length"),
        ({"advantages": np.float32(3)}, "differ in length"),
        ({"cu_seqlens": np.array([0, 5])}, "does not bound"),
        ({"cu_seqlens": np.zeros((3, 3), np.int64)}, "does not bound"),
        ({"cu_seqlens": np.array([0, 9, 5, 12, 20, 30, 40, 50, 60])}, "does not bound"),
        ({"cu_seqlens": np.arange(9)}, "does not cover"),
    ],
)
def test_a_record_whose_shapes_do_not_fit_is_refused(run, changed, fault):
    record = run.step(1)
    path = run.path / "steps" / "000002.safetensors"
    write_step_record(path, change(dict(record.streams), **changed), record.header)
    with pytest.raises(RunDirectoryError, match=fault):
        load_record(path)


def test_a_step_in_which_every_attempt_failed_has_a_record_without_rows(run):
    path = run.path / "steps" / "000002.safetensors"
    write_step_record(path, {"cu_seqlens": np.zeros(1, np.int64)}, {"step": 2})
    record = run.step(2)
    assert (record.num_tokens, record.sequences) == (0, ())
    assert "step 2" in record._repr_html_()


@pytest.mark.parametrize("content", [b"", b"{}", pickle.dumps({"step": 1}), b"\x08" + b"\0" * 7 + b"{}......"])
def test_what_is_no_record_is_refused(run, content):
    path = run.path / "steps" / "000002.safetensors"
    path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match="step record"):
        run.step(2)


@pytest.mark.parametrize("path", ["", "/missing/000000.safetensors"])
def test_a_record_that_is_not_there_is_refused(path):
    with pytest.raises(RunDirectoryError, match="is not a file"):
        load_record(path)


@pytest.mark.parametrize(
    "broken",
    [
        {"group_id": 5},
        {"reward": "high"},
        {"error": ["a"]},
        {"task": {"id": {}, "data": {}}},
        {"task": {"id": "a", "data": [1]}},
        {"metrics": {"a": "b"}},
        {"prompt": [{"role": "user", "content": 3}]},
        {"prompt": [{"role": "user", "content": "a", "channel": {}}]},
        {"prompt": [{"role": "user", "content": "a", "onclick": "b"}]},
        {"prompt": 3},
        {"schema_version": 9},
    ],
)
def test_a_trajectory_of_wrong_types_is_refused(run, broken):
    path = run.path / "trajectories" / "000001.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], json.dumps({**json.loads(lines[1]), **broken})]))
    with pytest.raises(RunDirectoryError, match=r"000001\.jsonl"):
        load_run(run.path).trajectories(1)


READER = """
import sys
seen = []
sys.addaudithook(lambda event, arguments: seen.append(event) if event in ("pickle.find_class", "exec.code") else None)
from keel.runs import load_run
run = load_run(sys.argv[1])
run.config, run.rows, run.status, run.environment, run.steps, run.checkpoints, run._repr_html_()
for read in (run.step, run.trajectories, run.weights):
    try:
        read(1)
    except Exception as error:
        print(type(error).__name__)
assert run.config.env.id == "trap:Env" and run.config.env.reward.id == "trap:reward"
assert not seen, seen
assert not {"trap", "torch", "transformers"} & set(sys.modules), sorted(sys.modules)
"""


def test_reading_a_strangers_run_imports_nothing_of_theirs_and_unpickles_nothing(tmp_path, groups):
    """The plug-ins it names could be imported: they lie on the path, and would leave a mark."""
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Env: pass\n")
    write_run(tmp_path / "run", groups, env=EnvConfig(id="trap:Env", reward={"id": "trap:reward"}))
    bomb = f"cbuiltins\neval\n(Vopen({str(tmp_path / 'sprung')!r}, 'w')\ntR.".encode()
    for name in ("steps/000001.safetensors", "trajectories/000001.jsonl", "summary.json"):
        (tmp_path / "run" / name).write_bytes(bomb)
    (tmp_path / "run" / "checkpoints" / "000001").mkdir()
    (tmp_path / "run" / "checkpoints" / "000001" / "manifest.json").write_bytes(bomb)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["RunDirectoryError", "RunDirectoryError"]
    assert not (tmp_path / "sprung").exists()
    pickle.loads(bomb).close()  # it would have gone off
    assert (tmp_path / "sprung").exists()


class Tags(HTMLParser):
    """What a page's reader would make of it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes.update(attrs)

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    handle_decl = handle_pi = unknown_decl = handle_comment


def test_foreign_text_never_becomes_markup(tmp_path, groups):
    """Of a run whose evaluations, streams and reason are hostile, and of a summary for each such text."""
    share = {"success": 0.5, "success_low": 0.4, "success_high": 0.6}
    log = write_run(tmp_path / "run", groups, close=False)
    for step, text in enumerate(HOSTILE.values()):
        log.log_eval(_utf8(text), share, step=step)
    log.close("stopped", _utf8("".join(HOSTILE.values())))
    streams = dict(load_run(tmp_path / "run").step(1).streams)
    named = {_utf8(text)[:99].replace("\0", ""): streams["input_ids"] for text in HOSTILE.values()}
    path = tmp_path / "run" / "steps" / "000003.safetensors"
    write_step_record(path, {**streams, **named}, {"step": 3})
    run = load_run(tmp_path / "run")
    summaries = [
        RunSummary(text, "failed", text, 1, {text: share}, {text: 2}, {text: 3.0}) for text in HOSTILE.values()
    ]
    for result in (run, run.step(3), *summaries):
        page = Tags(result._repr_html_())
        assert page.tags <= {"div", "strong", "table", "tr", "th", "td"}
        assert page.attributes <= {("style", "text-align:left")}
        assert not set(page.text) & set("\x1b\x07\x00\u202e\u2066\u2028"), "control characters"
    told = Tags(run._repr_html_()).text
    for text, summary in zip(HOSTILE.values(), summaries, strict=True):
        assert printable(text)[:10] in Tags(summary._repr_html_()).text
        assert printable(_utf8(text))[:10] in told


def _utf8(text: str) -> str:
    """What a file can hold of it: no lone surrogates."""
    return text.encode("utf-8", "replace").decode()


def test_a_text_in_a_trajectory_is_read_as_it_was_written(tmp_path, make_groups):
    group = make_groups(1, 1)[0]
    (attempt,) = group.trajectories
    said = tuple(Message("user", _utf8(text)) for text in HOSTILE.values())
    spoken = dataclasses.replace(attempt, prompt=said, task=Task(said[0].content, {"q": said[1].content}))
    write_run(tmp_path / "run", [dataclasses.replace(group, trajectories=(spoken,))])
    (found,) = load_run(tmp_path / "run").trajectories(1)
    assert isinstance(found, Trajectory)
    assert (found.prompt, found.task) == (said, spoken.task)
