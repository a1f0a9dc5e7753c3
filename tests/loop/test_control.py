"""The control run: the same rewards, paid to the wrong attempts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from benchmarks.control import shuffled_group_mean
from keel.algo.advantage import group_mean
from keel.loop import train
from keel.quickstart import quickstart_config

PLUGIN = "benchmarks.control:shuffled_group_mean"


def test_advantages_are_those_of_the_group_in_another_order():
    rewards = torch.tensor([0.0, 1.0, 0.25, 1.0, 0.5, 0.125])
    shuffled = shuffled_group_mean(rewards)
    assert torch.equal(shuffled.sort().values, group_mean(rewards).sort().values)
    assert not torch.equal(shuffled, group_mean(rewards))
    assert torch.equal(shuffled, shuffled_group_mean(rewards))
    assert not torch.equal(shuffled, shuffled_group_mean(rewards, seed=1))
    assert torch.equal(shuffled_group_mean(torch.full((4,), 0.1)), torch.zeros(4))


def test_what_one_did_says_nothing_about_what_one_gets():
    """Over all groups of eight with three successes, those who succeeded get what the others get."""
    successes = [torch.zeros(8).index_fill(0, torch.tensor(at), 1.0) for at in itertools.combinations(range(8), 3)]
    earned = torch.stack(successes)
    for seed in range(4):
        paid = torch.stack([shuffled_group_mean(rewards, seed=seed) for rewards in earned])
        assert torch.equal(paid.sum(1).abs() < 1e-5, torch.ones(len(paid), dtype=torch.bool))
        assert float((paid * (earned - earned.mean())).mean()) == pytest.approx(0.0, abs=0.02)  # 0.234 if not shuffled


def test_the_quickstart_takes_it():
    algo = quickstart_config(0, None, [f"algo.advantage={PLUGIN}"]).algo
    assert (algo.advantage.id, algo.advantage.options) == (PLUGIN, {})
    algo = quickstart_config(0, None, [f"algo.advantage={PLUGIN}", "algo.advantage.seed=3"]).algo
    assert algo.advantage.options == {"seed": 3}


def test_a_run_pays_the_wrong_attempts(tmp_path, make_config, warm_weights):
    """In the record of a step: each group's advantages are its own, but not where they were earned."""
    config = make_config(
        tmp_path / "run",
        model={"path": warm_weights("gpt_oss")},
        algo={"advantage": {"id": PLUGIN}},
        rollout={"groups_per_step": 4},
        steps=1,
    )
    train(config)
    record = load_file(tmp_path / "run" / "steps" / "000000.safetensors")
    moved = 0
    paid = paid_by_trajectory(record)
    for group in np.unique(record["trajectory_to_group"]):
        members = record["trajectory_to_group"] == group
        earned = group_mean(torch.from_numpy(record["rewards"][members])).numpy()
        assert np.array_equal(np.sort(paid[members]), np.sort(earned))
        moved += int((paid[members] != earned).sum())
    assert moved > 0


def paid_by_trajectory(record: dict[str, np.ndarray]) -> np.ndarray:
    """[N] the advantage that the tokens of each trajectory have; one and the same."""
    sequences = np.repeat(np.arange(len(record["cu_seqlens"]) - 1), np.diff(record["cu_seqlens"]))
    trajectories = record["sequence_to_trajectory"][sequences]
    paid = np.zeros(len(record["rewards"]), dtype=np.float32)
    for trajectory in range(len(paid)):
        (paid[trajectory],) = set(record["advantages"][(trajectories == trajectory) & record["loss_mask"]].tolist())
    return paid
