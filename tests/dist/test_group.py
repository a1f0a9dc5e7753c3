"""Two ranks behind the methods of one learner: the same numbers, the same files, and no rank left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from keel.algo.advantage import group_mean
from keel.algo.apply import add_advantages
from keel.batch import pack
from keel.config import AlgoConfig, KLConfig, LearnerConfig, ModelConfig, OptimConfig, Plugin, Stage
from keel.learner.base import LearnerError
from keel.learner.group import LearnerGroup
from keel.learner.learner import Learner
from keel.sync.base import WeightSource
from keel.types import Verdict

ALGO = AlgoConfig(
    kl=KLConfig(coefficient=0.1), entropy_coefficient=0.01, correction=(Plugin(id="token_truncated"),), updates_per_batch=2
)
# Adam moves an element whose gradient is itself rounding noise by the whole learning rate; a larger epsilon stops that,
# so that what is compared is the sharding.
STAGE = Stage("reinforcement", 0, 6, ALGO, OptimConfig(lr=1e-4, eps=1e-5, weight_decay=0.1, schedule="cosine"))


def train(learner, make_groups, until, max_tokens=50):
    """Odd numbers of micro-batches, so that one rank idles at times; returns the updates."""
    updates = []
    while learner.step < until:
        learner.enter(STAGE)
        groups = make_groups(3, 3, seed=learner.step)
        batch = learner.score(pack(groups, max_tokens=max_tokens, num_updates=2))
        batch = add_advantages(batch, group_mean, {})
        for index in range(batch.num_updates):
            updates.append(learner.backward(batch, index))
            learner.apply(updates[-1], Verdict())
    return updates


def weights_of(learner, path):
    learner.weights_to(WeightSource("file", str(path)))
    return load_file(path / "weights.safetensors")


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_ranks_equal_one_process(tiny_checkpoint, make_groups, tmp_path):
    """Three steps of two updates; then a checkpoint of either goes on in the other."""
    model = ModelConfig(path=tiny_checkpoint("gpt_oss", num_hidden_layers=2))
    one = Learner(model, LearnerConfig())
    with LearnerGroup(model, LearnerConfig(ranks=2)) as two:
        expected, found = train(one, make_groups, 3), train(two, make_groups, 3)
        assert (two.step, two.version, two.stage) == (one.step, one.version, one.stage) == (3, 6, STAGE)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
            assert ours.metrics.keys() == theirs.metrics.keys()
            assert ours.metrics["policy/recompute_max_dev"] == 0.0
            for name, value in theirs.metrics.items():
                assert ours.metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert_close(weights_of(two, tmp_path / "two"), weights_of(one, tmp_path / "one"))

        one.save(tmp_path / "by_one", {"x": 1})
        two.save(tmp_path / "by_two", {"x": 2})
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "by_two" / "weights")
        assert_close(dict(plain.named_parameters()), weights_of(one, tmp_path / "again"))
        train(one, make_groups, 5)
        assert two.load(tmp_path / "by_one") == {"x": 1}
        assert two.step == 3
        train(two, make_groups, 5)
        assert_close(weights_of(two, tmp_path / "two5"), weights_of(one, tmp_path / "one5"))
        resumed = Learner(model, LearnerConfig())
        assert resumed.load(tmp_path / "by_two") == {"x": 2}
        train(resumed, make_groups, 5)
        assert_close(weights_of(resumed, tmp_path / "resumed"), weights_of(one, tmp_path / "one5"))


def test_errors_and_a_dead_rank_are_told(tiny_checkpoint, make_groups):
    model = ModelConfig(path=tiny_checkpoint("qwen3", num_hidden_layers=2))
    with LearnerGroup(model, LearnerConfig(ranks=2)) as group:
        with pytest.raises(LearnerError, match="no storage to share"):
            group.weights_to(WeightSource("shared"))
        group.enter(STAGE)
        os.kill(group._processes[1].pid, signal.SIGKILL)
        with pytest.raises(LearnerError, match=r"rank 1 of 2 ended without an answer \(exit code -9"):
            group.score(pack(make_groups(2, 2), max_tokens=40))
        assert not any(process.is_alive() for process in group._processes)
        with pytest.raises(LearnerError, match="closed"):
            group.enter(STAGE)


def test_ranks_do_not_outlive_their_parent(tiny_checkpoint, tmp_path):
    """The parent is killed outright; the ranks notice by themselves."""
    program = f"""
import os, signal
from pathlib import Path
from keel.config import LearnerConfig, ModelConfig
from keel.learner.group import LearnerGroup
if __name__ == "__main__":
    group = LearnerGroup(ModelConfig(path={tiny_checkpoint("qwen3", num_hidden_layers=2)!r}), LearnerConfig(ranks=2))
    print(*(process.pid for process in group._processes), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    script = tmp_path / "parent.py"
    script.write_text(program)
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        # The ranks hold the pipe open: its end is their end.
        output = parent.communicate(timeout=200)[0]
    pids = [int(pid) for pid in output.split()]
    assert len(pids) == 2
    assert parent.returncode == -signal.SIGKILL
    for pid in pids:
        status = Path(f"/proc/{pid}/stat")
        assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_ranks_own_error_is_raised_here(tmp_path):
    with pytest.raises((OSError, ValueError)) as caught:
        LearnerGroup(ModelConfig(path=str(tmp_path / "nothing")), LearnerConfig(ranks=2))
    assert "in learner rank" in caught.value.__notes__[0]
