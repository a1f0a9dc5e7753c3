"""Another's run directory is read without running anything of it, wherever the reader stands."""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import keel
from keel.config import TrainConfig
from keel.config_load import dump
from keel.learner.checkpoint import writing
from keel.monitor.rows import append_row, write_json
from keel.rollouts.store import write_trajectories
from keel.types import Task, Trajectory

ROOT = Path(keel.__file__).parents[1]
MINE = "open({mark!r}, 'a').write(__name__)\n"
SHADOWED = ("plotly", "torch", "transformers", "wandb", "pandas", "sitecustomize", "trap", "typer", "json")


class Bomb:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.mark, "w")


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A run whose directory is full of traps: each leaves a mark if it is run or unpickled."""
    run_dir, mark = tmp_path / "run", str(tmp_path / "mark")
    run_dir.mkdir()
    for name in SHADOWED:
        (run_dir / f"{name}.py").write_text(MINE.format(mark=mark))
    config = {
        "env": {"id": "trap:Env", "reward": "trap:reward"},
        "algo": {"loss": "trap:loss"},
        "engine": {"id": "trap:Engine"},
        "warm_start": {"demonstrations": "trap:demonstrations"},
    }
    (run_dir / "config.toml").write_text(dump(TrainConfig.model_validate(config)))
    write_json(run_dir / "status.json", {"state": "completed", "reason": "", "steps": 1})
    append_row(run_dir / "metrics.jsonl", {"kind": "step", "stage": "reinforcement", "step": 0, "train_step": 1})
    write_trajectories(
        run_dir / "trajectories" / "000000.jsonl", [Trajectory(Task("t", {}), "g", 0, (), (), (), "completed")]
    )
    bomb = pickle.dumps(Bomb(mark))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", bomb)
    (run_dir / "steps").mkdir()
    (run_dir / "steps" / "000000.safetensors").write_bytes(bomb)
    with writing(run_dir / "checkpoints" / "000001", 1) as checkpoint:
        (checkpoint / "learner.json").write_text("{}")
        (checkpoint / "learner.safetensors").write_bytes(archive.getvalue())
        (checkpoint / "weights").mkdir()
        (checkpoint / "weights" / "pytorch_model.bin").write_bytes(archive.getvalue())
    return run_dir


# As an installed program finds Keel, by a path that comes last; and as `python -m keel` does, from a source tree.
INSTALLED = f"import runpy, sys; sys.path.append({str(ROOT)!r}); runpy.run_module('keel', run_name='__main__')"
STARTS = {"installed": (["-P", "-c", INSTALLED], ""), "module": (["-m", "keel"], str(ROOT))}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("arguments", [("report", "."), ("compare", ".", ".")], ids=" ".join)
def test_commands_that_read_run_nothing(stranger, tmp_path, start, arguments):
    python, path = STARTS[start]
    command = [sys.executable, *python, *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=stranger, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "mark").exists(), (tmp_path / "mark").read_text()


def test_reading_from_python_runs_nothing(stranger, tmp_path):
    code = (
        "import keel, sys; run = keel.load_run(sys.argv[1]); run.config, run.status, run.rows, run.steps; "
        "run.trajectories(0); run.checkpoints; print(run.problems)"
    )
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.append({str(ROOT)!r}); {code}", str(stranger)]
    done = subprocess.run(command, cwd=stranger, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "mark").exists()


def test_no_part_of_keel_unpickles_a_file():
    """What is unpickled comes through pipes of Keel's own processes; torch.load reads tensors of others' logs alone."""
    for path in (ROOT / "keel").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        loads = re.findall(r"torch\.load\(([^)]*)\)", text)
        assert not loads or path.parent.name == "gap", path
        assert all("weights_only=True" in each for each in loads), path
        assert "allow_pickle=True" not in text, path
        assert ("pickle.load" in text) <= (path.name == "rank.py"), path
