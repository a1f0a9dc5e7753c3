"""A mode is a value: the same `train()` in one process and in several gives the same run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from keel.build import build
from keel.config import TrainConfig
from keel.envs.arithmetic import CalculatorEnv
from keel.loop import run_stages, train
from keel.monitor.runlog import RunLog

STEPS = 3
SECONDS = ("_s", "_mib", "/mfu")  # what tells of time and memory differs from run to run


class Sums(CalculatorEnv):
    """The nearer the answer, the higher the reward: attempts differ, so every step has a gradient."""

    def __init__(self) -> None:
        super().__init__(tasks_of=("chain_sum",), num_tasks=300, max_terms=2, max_digits=1)

    def score(self, answer: str) -> float:
        assert self._task is not None
        try:
            return 1.0 / (1.0 + abs(int(answer) - int(str(self._task.data["answer"]))))
        except ValueError:
            return 0.0


class Wired:
    """An object behind a wire: what goes in and comes out of its methods has been pickled and read back."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not callable(found):
            return pickle.loads(pickle.dumps(found))

        def call(*arguments: Any, **options: Any) -> Any:
            arguments, options = pickle.loads(pickle.dumps((arguments, options)))
            return pickle.loads(pickle.dumps(found(*arguments, **options)))

        return call


@pytest.fixture(scope="module")
def configured(make_config, warm_weights):
    """`configured(run_dir, **sections)`: the same short run, wherever its parts live."""

    def make(run_dir: Path, **sections: Any) -> TrainConfig:
        # Adam moves an element whose gradient is itself rounding noise by the whole learning rate; a larger epsilon
        # stops that, so that what is compared is the work of the processes.
        optim = {"lr": 1e-4, "eps": 1e-5}
        return make_config(
            run_dir,
            model={"path": warm_weights("gpt_oss")},
            steps=STEPS,
            warm_start={"steps": 3, "demonstrations_per_step": 8, "optim": optim},
            optim=optim,
            batch={"max_tokens": 300},
            eval={"num_tasks": 12},
            **sections,
        )

    return make


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, configured) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    train(configured(run_dir), Sums)
    return run_dir


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """Every row of the run, without what tells the time, and without checks that shared weights need not."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if not name.endswith(SECONDS) and not name.startswith("sync/")}
        for row in rows
    ]


def weights_of(run_dir: Path) -> Mapping[str, torch.Tensor]:
    (weights,) = (run_dir / "checkpoints").glob("*/weights/model.safetensors")
    return load_file(weights)


def episodes_of(run_dir: Path) -> list[dict[str, Any]]:
    """Every trajectory, word for word, without its seconds."""
    texts = [path.read_text() for path in sorted((run_dir / "trajectories").glob("*.jsonl"))]
    return [without_seconds(json.loads(line)) for text in texts for line in text.splitlines()]


def without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_seconds(part) for name, part in value.items() if not name.endswith(SECONDS)}
    return [without_seconds(part) for part in value] if isinstance(value, list) else value


def test_the_run_is_worth_comparing(one_process):
    """It learns at every step, from episodes in which calls were answered."""
    rows = [row for row in rows_of(one_process) if row["kind"] == "step"]
    assert [row["stage"] for row in rows] == ["warm_start"] * 3 + ["reinforcement"] * STEPS
    assert all(row["policy/grad_norm"] > 1e-3 for row in rows)
    assert all(row["rollout/turns"] > 1.2 for row in rows if row["stage"] == "reinforcement")


def test_an_engine_in_a_second_process(one_process, configured, tmp_path):
    """Requests over a pipe, weights by file: the same run to the bit."""
    train(configured(tmp_path / "run", engine={"process": "separate"}), Sums)
    assert_equal(tmp_path / "run", one_process)


def test_everything_that_crosses_the_loop_can_be_sent(one_process, configured, tmp_path):
    """Groups, batches, updates, verdicts and states go through pickle on every call, and nothing is lost by it."""
    config = configured(tmp_path / "run")
    with RunLog.open(config) as run, build(config, Sums, run) as parts:
        wired = replace(
            parts,
            learner=Wired(parts.learner),
            sources={name: Wired(source) for name, source in parts.sources.items()},
            collector=Wired(parts.collector),
            monitor=Wired(parts.monitor),
        )
        run_stages(config, run, wired)
    assert_equal(tmp_path / "run", one_process)


@pytest.mark.parametrize("process", ["same", "separate"])
def test_a_learner_of_two_ranks(one_process, configured, tmp_path, process):
    """FSDP2 over gloo, the engine with its own copy of the weights here or in a third process."""
    train(configured(tmp_path / "run", learner={"ranks": 2}, engine={"process": process}), Sums)
    assert_close(tmp_path / "run", one_process)


def assert_equal(run_dir: Path, expected: Path) -> None:
    assert rows_of(run_dir) == rows_of(expected)
    assert episodes_of(run_dir) == episodes_of(expected)
    found, wanted = weights_of(run_dir), weights_of(expected)
    assert found.keys() == wanted.keys()
    assert not [name for name, tensor in found.items() if not torch.equal(tensor, wanted[name])]


def assert_close(run_dir: Path, expected: Path, tolerance: float = 1e-6) -> None:
    """Weights and metrics within `tolerance`; the same words, because no draw lies that near a border."""
    rows = ([row for row in rows_of(path) if row["kind"] != "worst_tokens"] for path in (run_dir, expected))
    for row, wanted in zip(*rows, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            # How far engine and learner are apart is itself rounding, and its maximum no smoother than that.
            allowed = 5 * tolerance if name == "mismatch/abs_max" else tolerance
            close = value if isinstance(value, str) else pytest.approx(value, rel=tolerance, abs=allowed)
            assert row[name] == close, f"{row['kind']} {row['step']}: {name}"
    words = [[[turn["reply_text"] for turn in e["turns"]] for e in episodes_of(run)] for run in (run_dir, expected)]
    assert words[0] == words[1]
    found, wanted = weights_of(run_dir), weights_of(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, wanted[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
