"""Learner against engine in whole runs: rounding explains nearly all, near-ties of a router the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file

from keel.config import EngineConfig, ModelConfig
from keel.engines.base import WeightSource
from keel.engines.embedded.engine import EmbeddedEngine
from keel.loop import train
from keel.models.policy import PolicyModel

ROUTERS = {"gpt_oss": "model.layers.1.mlp.router", "qwen3_moe": "model.layers.1.mlp.gate"}


def with_near_ties(weights: str, router: str, path: Path) -> str:
    """The checkpoint with a layer whose router tells its experts apart by little more than rounding."""
    shutil.copytree(weights, path)
    tensors = load_tensors(path / "model.safetensors")
    rows = tensors[f"{router}.weight"]
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    rows.copy_(rows[0] * (1.0 + 1e-6 * noise))
    if f"{router}.bias" in tensors:
        tensors[f"{router}.bias"].zero_()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


class Copy(EmbeddedEngine):
    """An engine with its own copy of the weights, in which something may differ whatever is published to it."""

    def __init__(self, model: ModelConfig, config: EngineConfig, *, max_sequence_tokens: int) -> None:
        policy = PolicyModel.load(model.path)
        super().__init__(policy, config, max_sequence_tokens=max_sequence_tokens, shares_weights=False)

    async def load_weights(self, source: WeightSource, version: int) -> None:
        await super().load_weights(source, version)
        for layer in self.policy.model.base_model.layers:
            self.change(layer)

    def change(self, layer: torch.nn.Module) -> None:
        """Nothing."""


class Rounding(Copy):
    """Each weight is off by a last bit or two: what other, equally right, kernels would make of the results."""

    def change(self, layer: torch.nn.Module) -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in layer.parameters():
            parameter.data *= 1.0 + 1e-7 * torch.randn(parameter.shape, generator=generator)


class NoSinks(Copy):
    def change(self, layer: torch.nn.Module) -> None:
        layer.self_attn.sinks.data.fill_(-1e4)


class NoWindow(Copy):
    def change(self, layer: torch.nn.Module) -> None:
        layer.self_attn.sliding_window = None


@pytest.fixture
def one_step(tmp_path, make_config):
    """`one_step(weights, engine)`: row and record of one step of 4 x 8 episodes."""

    def go(weights: str, engine: type[Copy]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        train(
            make_config(
                tmp_path / "run",
                model={"path": weights},
                engine={"id": f"{engine.__module__}:{engine.__name__}"},
                rollout={"groups_per_step": 4},
                learner={"replay_routes": "off"},  # else the flips are followed
                sync={"check_every": 0},  # else the faults end the run
                steps=1,
            )
        )
        rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        (row,) = [row for row in rows if row["kind"] == "step"]
        return row, load_file(tmp_path / "run" / "steps" / "000000.safetensors")

    return go


@pytest.mark.parametrize("preset", ROUTERS)
def test_outliers_of_a_near_tie_are_explained(tmp_path, one_step, warm_weights, preset):
    """Experts really flip between engine and learner; every token they move is counted, and put down to them."""
    row, record = one_step(with_near_ties(warm_weights(preset), ROUTERS[preset], tmp_path / "tied"), Rounding)
    assert row["mismatch/route_diff"] > 0.01
    assert row["mismatch/outliers"] > 0.01 * row["rollout/tokens"]
    assert row["mismatch/outliers_routed"] == row["mismatch/outliers"]
    # Counted anew from the record.
    gap = np.abs(record["logprobs"] - record["rollout_logprobs"])[record["loss_mask"]]
    assert len(gap) == row["rollout/tokens"]
    assert row["mismatch/outliers"] == (gap > 1e-4).sum()
    assert row["mismatch/outlier_share"] == (gap > 1e-4).mean()
    assert row["mismatch/abs_mean"] == pytest.approx(gap.mean(dtype=np.float64), rel=1e-6)
    assert row["mismatch/abs_max"] == gap.max()
    # The policy that is trained is none the less the one that was scored.
    assert row["policy/ratio_max_dev"] == row["policy/recompute_max_dev"] == 0.0


@pytest.mark.parametrize("preset", ROUTERS)
def test_rounding_alone_makes_no_outliers(one_step, warm_weights, preset):
    """What the planted ties and faults are to be compared with."""
    row, _ = one_step(warm_weights(preset), Rounding)
    assert 0.0 < row["mismatch/abs_mean"] < 1e-5
    assert row["mismatch/outliers"] == row["mismatch/outliers_routed"]
    assert row["mismatch/outlier_share"] < 0.01


@pytest.mark.parametrize("engine", [NoSinks, NoWindow])
def test_outliers_of_a_fault_are_not_explained(one_step, warm_weights, engine):
    """An engine without sinks or window: many tokens are far off, and no near-tie is the excuse for most of them."""
    row, _ = one_step(warm_weights("gpt_oss"), engine)
    assert row["mismatch/outlier_share"] > 0.2
    assert row["mismatch/outliers_routed"] < 0.5 * row["mismatch/outliers"]
    assert row["mismatch/abs_mean"] > 1e-4
    assert row["policy/ratio_max_dev"] == row["policy/recompute_max_dev"] == 0.0  # neither can see the engine
