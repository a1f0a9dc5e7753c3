"""report.html of real runs: one that completes, one that dies, and one that cannot write it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from keel import config_load
from keel import loop as training
from keel.config import TrainConfig
from keel.loop import train

CONFIG = """
steps = 2
name = "small"
[model.tiny]
preset = "gpt_oss"
options = { num_hidden_layers = 2 }
[env]
id = "CalculatorEnv"
[rollout]
groups_per_step = 2
group_size = 4
max_turns = 2
max_new_tokens = 12
max_sequence_tokens = 192
[batch]
max_tokens = 2048
[optim]
warmup_steps = 1
[log]
live = "off"
"""


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    file = tmp_path / "run.toml"
    file.write_text(CONFIG)
    return config_load.load(file, [f"run_dir={tmp_path / 'run'}"])


def shown(run_dir: str) -> Any:
    text = (Path(run_dir) / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'id="keel-data">(.*?)</script>', text, re.DOTALL)[1])


def test_a_completed_run_has_a_report_of_every_episode_with_its_tokens_spelled(config):
    summary = train(config)
    data = shown(summary.run_dir)
    assert (data["run"]["state"], data["run"]["steps_done"]) == ("completed", 2)
    assert all(entry["ok"] for entry in data["invariants"])
    assert {"ratio", "recompute", "mismatch", "records", "baseline"} <= {entry["name"] for entry in data["invariants"]}
    assert data["sampling"] == "Everything is here: all 16 episodes of all 2 recorded steps, with their tokens."
    for step in data["steps"].values():
        for group in step["groups"]:
            for each in group["trajectories"]:
                tokens = each["tokens"]
                # What the tokens spell is what the messages say: the policy's own words are among its own tokens.
                drawn = "".join(
                    hexes for hexes, origin in zip(tokens["bytes"], tokens["origin"], strict=True) if origin == "p"
                )
                asked = each["messages"][0]["content"].encode().hex()
                assert asked in "".join(tokens["bytes"])
                assert each["num_policy_tokens"] == tokens["origin"].count("p") > 0
                assert (
                    each["messages"][1]["content"].encode("utf-8", "replace").hex() in drawn
                    or "\ufffd" in each["messages"][1]["content"]
                )


def test_a_run_that_dies_leaves_a_report_that_says_of_what(config, monkeypatch):
    real = training.train_step

    def dies(config: TrainConfig, run: Any, parts: Any, stage: Any, step: int) -> Any:
        if step == 1:
            raise RuntimeError("the disk is full")
        return real(config, run, parts, stage, step)

    monkeypatch.setattr(training, "train_step", dies)
    with pytest.raises(RuntimeError, match="the disk is full"):
        train(config)
    data = shown(config.run_dir)
    assert data["verdict"]["level"] == "bad"
    assert data["verdict"]["text"].startswith("Crashed after 1 of 2 steps: RuntimeError: the disk is full.")
    assert list(data["steps"]) == ["0"]


def test_a_report_that_cannot_be_written_costs_the_run_nothing(config, monkeypatch):
    from keel.report import write

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError("no space left on the device")

    monkeypatch.setattr(write, "write_text", fails)
    assert train(config).state == "completed"
    assert not (Path(config.run_dir) / "report.html").exists()


def test_a_completed_run_that_was_killed_before_its_report_gets_it_on_resuming(config):
    summary = train(config)
    report = Path(summary.run_dir) / "report.html"
    report.unlink()
    assert training.resume(summary.run_dir).state == "completed"
    assert shown(summary.run_dir)["run"]["state"] == "completed"
    written = report.stat().st_mtime_ns
    training.resume(summary.run_dir)
    assert report.stat().st_mtime_ns == written  # it is up to date, and left alone
