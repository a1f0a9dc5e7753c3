"""What replaying an engine's routes is worth, in numbers: python -m benchmarks.routing_replay

An engine with routers that send a share of tokens elsewhere (`router_flips` of `keel.models.distorted`) samples from a
small mixture of experts; a learner on the same weights looks at what was drawn, with its own choice of experts and with
the engine's. A dense model of the same size says what gap rounding alone makes. Writes results/routing_replay.json.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from keel.algo.advantage import group_mean
from keel.algo.apply import add_advantages
from keel.batch import PackedBatch, pack
from keel.chat.base import Prompt
from keel.config import AlgoConfig, EngineConfig, LearnerConfig, ModelConfig, OptimConfig, Stage
from keel.distortion import Distortion
from keel.engines.base import Engine, GenerateRequest
from keel.engines.embedded.engine import EmbeddedEngine
from keel.learner.learner import Learner
from keel.models.distorted.modules import flipped
from keel.models.policy import PolicyModel
from keel.models.tiny import Preset, build_tiny_model
from keel.rollouts.tokens import TokenRecord
from keel.types import Group, SamplingSettings, Task, Trajectory, Turn

__all__ = ["figures", "flipping_engine", "sample_groups"]

RESULTS = Path(__file__).parent / "results" / "routing_replay.json"
STAGE = Stage("reinforcement", 0, 8, AlgoConfig(), OptimConfig(lr=1e-3))
SIZES: Mapping[Preset, Mapping[str, int]] = {
    "qwen3": {"num_hidden_layers": 3},
    "gpt_oss": {"num_hidden_layers": 3},
    "qwen3_moe": {"num_hidden_layers": 3},
}
SHARES = (0.0, 0.02, 0.1, 0.3)
MAX_TOKENS = 160


def flipping_engine(path: str, dtype: str, share: float, stack: ExitStack) -> EmbeddedEngine:
    """An engine with weights of its own whose routers send about `share` of each layer's tokens elsewhere."""
    policy = PolicyModel.load(path, dtype=dtype)
    if share > 0:
        for router in policy.routers:
            stack.enter_context(flipped(router, Distortion("router_flips", share, group="module")))
    config = EngineConfig(slots=32, prefill_tile=64)
    return EmbeddedEngine(policy, config, max_sequence_tokens=MAX_TOKENS, shares_weights=False)


def sample_groups(
    engine: Engine,
    sampling: SamplingSettings,
    *,
    num_groups: int = 8,
    group_size: int = 4,
    num_new: int = 48,
    vocab_size: int = 320,
    return_support: bool = False,
) -> list[Group]:
    """Episodes of two turns of `num_new` tokens each, after random prompts; rewards are random too."""
    generator = np.random.default_rng(0)
    routes = engine.capabilities().returns_routes

    async def play(index: int, prompt: tuple[int, ...], tool: tuple[int, ...]) -> Trajectory:
        record, turns = TokenRecord(), []
        for turn, new in enumerate((prompt, tool)):
            tokens = (*record.token_ids, *new)
            record.feed(Prompt(tokens, extends=turn > 0))
            segment, span = record.place
            request = GenerateRequest(
                f"{index}/{turn}", str(index), tokens, sampling, num_new, (), index * 2 + turn, routes, return_support
            )
            record.draw(await engine.generate(request))
            turns.append(Turn((), "", "length", segment, span))
        group, attempt = divmod(index, group_size)
        task = Task(f"task {group}")
        reward = float(generator.random() < 0.5)
        return Trajectory(task, f"g{group}", attempt, (), tuple(turns), record.segments(), "completed", reward)

    async def play_all() -> list[Trajectory]:
        draws = generator.integers(0, vocab_size, (num_groups * group_size, 2, 16))
        pairs = [(tuple(first.tolist()), tuple(second.tolist())) for first, second in draws]
        return list(await asyncio.gather(*(play(index, *pair) for index, pair in enumerate(pairs))))

    done = asyncio.run(play_all())
    rows = [done[start : start + group_size] for start in range(0, len(done), group_size)]
    return [Group(row[0].group_id, row[0].task, tuple(row)) for row in rows]


def learn(path: str, dtype: str, batch: PackedBatch, mode: Any) -> dict[str, float]:
    """What the learner's first update on `batch` measures."""
    learner = Learner(ModelConfig(path=path, dtype=dtype), LearnerConfig(replay_routes=mode))
    learner.enter(STAGE)
    return dict(learner.backward(learner.score(batch)).metrics)


def figures(path: str, dtype: str, share: float, modes: Iterable[str] = ("off", "auto")) -> dict[str, dict[str, float]]:
    """The metrics of one batch, drawn with `share` of the routes flipped, by mode of replay."""
    with ExitStack() as stack:
        groups = sample_groups(flipping_engine(path, dtype, share, stack), SamplingSettings())
    batch = add_advantages(pack(groups, max_tokens=2048), group_mean, {})
    return {mode: learn(path, dtype, batch, mode) for mode in modes}


def main() -> None:
    """Measure and write; about a minute."""
    torch.set_num_threads(1)
    kept: tuple[str, ...] = ("mismatch/abs_mean", "mismatch/abs_max", "mismatch/k3", "mismatch/outlier_share")
    kept += ("mismatch/route_diff", "mismatch/route_disagreement", "routes/replayed_share", "routes/missing_share")
    kept += ("policy/ratio_max_dev", "policy/recompute_max_dev")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for preset, sizes in SIZES.items():
            path = str(Path(directory) / preset)
            build_tiny_model(preset, path, vocab_size=320, seed=1, **sizes)
            for dtype in ("float32", "bfloat16"):
                for share in SHARES if preset != "qwen3" else (0.0,):
                    for mode, metrics in figures(path, dtype, share).items():
                        found = {name: metrics[name] for name in kept if name in metrics}
                        rows.append({"model": preset, "dtype": dtype, "flips": share, "replay": mode, **found})
                        print(json.dumps(rows[-1]))  # noqa: T201 (a script says how far it is)
    RESULTS.write_text(json.dumps({"command": "python -m benchmarks.routing_replay", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
