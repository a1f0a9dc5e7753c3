"""Small whole runs in processes of their own, what they leave behind, and how two of them are compared."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import keel

CONFIG = """
steps = 6
seed = 3
num_threads = 1
warm_start = { steps = 16, demonstrations_per_step = 8, optim = { lr = 1e-2 } }
optim = { lr = 1e-3, schedule = "cosine" }
checkpoint = { every = 2 }
eval = { num_tasks = 8, every = 3 }
env = { id = "kill_world:Buttons" }
chat = { system_message = "none" }
engine = { slots = 8 }
[model.tiny]
preset = "gpt_oss"
vocab_size = 320
options = { num_hidden_layers = 2, hidden_size = 48, intermediate_size = 40, num_local_experts = 4, head_dim = 16 }
[rollout]
groups_per_step = 2
group_size = 4
max_turns = 3
max_new_tokens = 24
max_sequence_tokens = 128
"""
WARM_START_STEPS, STEPS = 16, 6
Aim = Mapping[str, Any]


class Run:
    """A run in `path`, through keel's command line in a process of its own; `sets` are its `--set` settings."""

    here = Path(__file__).parent
    timeout_s = 200

    def __init__(self, path: Path) -> None:
        self.path = path
        self.output = ""
        self.seconds = 0.0  # that the last process lived
        self._config = path.with_name(f"{path.name}.toml")
        self._config.write_text(CONFIG, encoding="utf-8")
        self.sets: tuple[str, ...] = ()

    def go(self, aim: Aim | None = None, *, killed_after_s: float | None = None) -> int:
        """Start it, or resume it if it has begun; returns the exit code, -9 if it was killed. `aim`: see killing.py."""
        begun = (self.path / "config.toml").exists()
        sets = [f"--set={setting}" for setting in (f"run_dir={str(self.path)!r}", *self.sets)]
        command = ["resume", str(self.path)] if begun else ["train", str(self._config), *sets]
        source = Path(keel.__file__).parent.parent
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (source, self.here)))}
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, str(self.here / "killing.py"), json.dumps(aim or {}), *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            # Until the last process that holds the pipe has ended: no child outlives a killed run.
            self.output = process.communicate(timeout=killed_after_s or self.timeout_s)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            self.output = process.communicate()[0]
            assert killed_after_s, f"not done after {self.timeout_s} s:\n{self.output}"
        self.seconds = time.monotonic() - began
        return process.returncode

    def finish(self) -> None:
        assert self.go() == 0, self.output

    def set(self, old: str, new: str) -> None:
        """Change the run's own config, as one who resumes it may."""
        config = self.path / "config.toml"
        text = config.read_text(encoding="utf-8")
        assert text.count(old) == 1, old
        config.write_text(text.replace(old, new), encoding="utf-8")

    def die(self, aim: Aim) -> None:
        assert self.go(aim) == -signal.SIGKILL, f"the aim was never reached:\n{self.output}"

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.path / "checkpoints").iterdir())


def remains(run: Run) -> dict[str, Any]:
    """Everything a finished run left, by file and part of it, without what tells the time or the place."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in run.path.rglob("*") if path.is_file()):
        name = str(path.relative_to(run.path))
        if path.suffix == ".safetensors":
            found |= _tensors(path, name)
        elif path.suffix == ".jsonl":
            found[name] = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif name in ("summary.json", "status.json") or path.name == "learner.json":
            found[name] = _timeless(json.loads(path.read_text()))
        elif name == "config.toml":
            found[name] = [line for line in path.read_text().splitlines() if not line.startswith("run_dir")]
        elif name in ("environment.json", "report.html") or path.name == "manifest.json":  # they tell times
            found[name] = "present"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _tensors(path: Path, name: str) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        found = {f"{name}: metadata": file.metadata()}
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            tensor = file.get_tensor(key)
            content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            found[f"{name}: {key}"] = (str(tensor.dtype), tensor.shape, hashlib.sha256(content).hexdigest())
    return found


def _timeless(value: Any) -> Any:
    """`value` without seconds, speeds, memory and process numbers."""
    if isinstance(value, dict):
        dropped, ends = ("run_dir", "source", "seconds", "pid"), ("_s", "_mib", "/mfu")
        return {key: _timeless(item) for key, item in value.items() if key not in dropped and not key.endswith(ends)}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def assert_complete(run: Run) -> None:
    """Every step and every evaluation has left its row, its record and its trajectories once, in order."""
    rows = run.rows()
    steps = [(row["stage"], row["step"]) for row in rows if row["kind"] == "step"]
    wanted = [("warm_start", step) for step in range(WARM_START_STEPS)]
    assert steps == wanted + [("reinforcement", step) for step in range(STEPS)]
    assert [row["name"] for row in rows if row["kind"] == "eval"] == ["initial", "after_warm_start", "step_3", "final"]
    for directory in ("steps", "trajectories"):
        names = sorted(path.name.partition(".")[0] for path in (run.path / directory).iterdir())
        assert names == [f"{step:06d}" for step in range(STEPS)]
    assert all(len(path.read_text().splitlines()) == 8 for path in (run.path / "trajectories").iterdir())
    assert run.json("status.json")["state"] == run.json("summary.json")["state"] == "completed"


def assert_same(run: Run, undisturbed: Run) -> None:
    """`run` left what the undisturbed run left: all of it, to the bit, and nothing more."""
    assert_complete(run)
    found, expected = remains(run), remains(undisturbed)
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    assert not [name for name in found if found[name] != expected[name]]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing happens to; made once for all of pytest's processes."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    run = Run(shared / "undisturbed")
    seconds = shared / "undisturbed.seconds"
    with (shared / "undisturbed.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not seconds.exists():
            run.finish()
            seconds.write_text(str(run.seconds))
    run.seconds = float(seconds.read_text())
    assert_complete(run)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that has not begun."""
    return Run(tmp_path / "run")


@pytest.fixture
def other_run(tmp_path: Path) -> Run:
    """Another one."""
    return Run(tmp_path / "other")


@pytest.fixture
def is_same() -> Any:
    """`is_same(run, other)` asserts that both left the same."""
    return assert_same


@pytest.fixture
def same_as_undisturbed(undisturbed: Run) -> Any:
    """`same_as_undisturbed(run)` asserts it."""
    return lambda run: assert_same(run, undisturbed)
