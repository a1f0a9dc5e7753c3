"""A run that does not get on says who waits for whom, and goes on when it can."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from keel.chat.base import Reply
from keel.envs.base import Env, Step
from keel.loop import train
from keel.models.tiny import build_tiny_model, build_tiny_tokenizer
from keel.monitor.rows import read_rows
from keel.types import Message, Task

HUNG_TASK = "t3"


class Sleepy(Env):
    """One step, then done. At one task, once, it does `mischief` before it answers."""

    mischief: ClassVar[Callable[[], None]]
    done: ClassVar[bool]

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(f"t{number}", {}) for number in range(4)]

    def reset(self, task: Task) -> Sequence[Message]:
        self.task = task
        return [Message("user", "Go.")]

    def step(self, reply: Reply) -> Step:
        if self.task.id == HUNG_TASK and not Sleepy.done:
            Sleepy.done = True
            Sleepy.mischief()
        return Step((), reward=float(len(reply.text) % 2), done=True)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build_tiny_model("gpt_oss", path, tokenizer=build_tiny_tokenizer(["Go."], style="harmony"), seed=0)
    return path


@pytest.fixture
def play(tmp_path: Path, model_path: Path, make_config: Callable[..., Any]) -> Callable[..., Path]:
    def play(mischief: Callable[[], None], **sections: Any) -> Path:
        Sleepy.mischief, Sleepy.done = staticmethod(mischief), False
        rollout = {"groups_per_step": 4, "group_size": 2, "max_new_tokens": 6, "max_turns": 1}
        given = {
            "steps": 1,
            "model": {"path": str(model_path)},
            "chat": {"system_message": "none"},
            "rollout": rollout,
            "monitor": {"stall_timeout_s": 1.0},
        }
        config = make_config(tmp_path / "run", **{**given, **sections}, warm_start={"steps": 0})
        summary = train(config, Sleepy)
        assert (summary.state, summary.steps) == ("completed", 1)
        return tmp_path / "run"

    return play


def told(run_dir: Path, needle: str) -> tuple[str, dict[str, Any]] | None:
    """The dump that holds `needle` and its alarm's row, once both are there. A slow machine may stall before, too."""
    for row in read_rows(run_dir / "metrics.jsonl"):
        if row["kind"] == "alarm" and row["rule"] == "stall":
            text = Path(row["text"].rpartition(" in ")[2]).read_text()
            if needle in text:
                return text, row
    return None


def wait_until_told(run_dir: Path, needle: str) -> None:
    never = threading.Event()
    while not told(run_dir, needle):
        never.wait(0.02)


def test_a_hanging_environment_is_named_with_its_task_and_its_stack(play, tmp_path, capsys):
    here = "in wait_until_told"  # where the environment's thread stands
    run_dir = play(lambda: wait_until_told(tmp_path / "run", here))
    text, alarm = told(run_dir, here)
    assert "waits for: rollout: 1 episode waiting for env.step" in text
    assert f"at task '{HUNG_TASK}'" in text
    assert "keel-watchdog" in text
    assert (alarm["severity"], alarm["stage"], alarm["step"]) == ("warn", "reinforcement", 0)
    assert "waits for rollout: 1 episode waiting for env.step" in alarm["text"]
    output = capsys.readouterr().out
    assert "alarm stall (warn) at reinforcement step 0" in output
    assert "going on again after" in output


def test_a_stopped_engine_process_is_named(play, tmp_path):
    """Its process is stopped from outside, as a debugger or an operator does it, and let go once the dump is there."""

    def stop_engine() -> None:
        (engine,) = [child for child in multiprocessing.active_children() if child.name == "keel-engine"]
        os.kill(engine.pid, signal.SIGSTOP)

        def let_go() -> None:
            wait_until_told(tmp_path / "run", "it was stopped by a signal")
            os.kill(engine.pid, signal.SIGCONT)

        threading.Thread(target=let_go, daemon=True).start()

    run_dir = play(stop_engine, engine={"process": "separate"})
    text, alarm = told(run_dir, "it was stopped by a signal")
    assert "waits for: engine (stopped)" in text
    assert "waits for engine (stopped)" in alarm["text"]


@pytest.mark.soak
def test_every_process_shows_its_stacks(play, tmp_path):
    here = "in wait_until_told"
    run_dir = play(
        lambda: wait_until_told(tmp_path / "run", here), engine={"process": "separate"}, learner={"ranks": 2}
    )
    text, _ = told(run_dir, here)
    for name, function in (("engine", "run_worker"), ("learner rank 0", "run_rank"), ("learner rank 1", "run_rank")):
        part = text.partition(f"== {name}, process ")[2].partition("\n== ")[0]
        assert function in part, text


def test_a_run_that_gets_on_is_not_told_to_stall(play):
    run_dir = play(lambda: None, monitor={"stall_timeout_s": 60.0})
    assert not (run_dir / "stalls").exists()
    status = json.loads((run_dir / "status.json").read_text())
    assert status["progress_unix_s"] <= status["heartbeat_unix_s"]
