"""The first hour over rows of one's own, in real processes: new, rollout, train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import keel

SHORT = ["--set", "warm_start.steps=3", "--set", "warm_start.demonstrations_per_step=4", "--set", "eval.num_tasks=4"]
SHORT += ["--set", "warm_start.optim.warmup_steps=0", "--set", "optim.warmup_steps=0"]


def run_keel(*arguments, cwd):
    source = str(Path(keel.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "keel", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rows_of_ones_own_from_new_to_trained(tmp_path):
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(200)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_keel("new", "sums", "--data", "sums.jsonl", cwd=tmp_path)
    here = tmp_path / "sums"

    told = run_keel("rollout", "run.toml", "-n", "9", "--json", "signal.json", *SHORT, cwd=here)
    assert "9 episodes are not whole groups of 8: playing 16" in told
    assert "c| <|start|>user<|message|>What is" in told
    assert "signal" in told.splitlines()[-1] or "what to do" in told
    figures = json.loads((here / "signal.json").read_text())
    assert figures["episodes"] == 16
    assert figures["metrics"]["policy/recompute_max_dev"] == 0.0
    assert figures["projection"]["step_s"] > 0
    assert figures["memory"]["peak"] > figures["memory"]["before"] > 0
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == [
        *("README.md", "env.py", "rows.jsonl", "run.toml", "signal.json", "test_env.py")
    ]

    told = run_keel("train", "run.toml", *SHORT, "--set", "steps=2", "--set", "run_dir=out", cwd=here)
    assert "completed: out" in told
    run = keel.load_run(here / "out")
    steps = [row for row in run.rows if row.get("stage") == "reinforcement" and row["kind"] == "step"]
    assert len(steps) == 2
    assert all(row["policy/ratio_max_dev"] == 0.0 for row in steps)
