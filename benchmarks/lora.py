"""LoRA learns the quickstart's task: warmed up in full, reinforced through an adapter.

    python -m benchmarks.lora --preset gpt_oss --rank 16 --out runs/lora
    python -m benchmarks.lora --preset qwen3 --rank 16 --out runs/lora

A model made here has no pretrained weights to adapt, so there are two runs. The first is the quickstart's warm start
with full weights and no reinforcement. The second starts from its checkpoint, freezes everything and lets an adapter
learn; it differs from the quickstart's reinforcement in nothing else but the learning rate. Its last checkpoint holds
the adapter alone. As commands, with `lora.toml` the quickstart's recipe without its [model.tiny] and [warm_start]:

    python -m keel quickstart --run-dir runs/warm --set steps=0
    python -m keel train lora.toml --set 'model.path="runs/warm/checkpoints/000900/weights"' --set model.lora.rank=16
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.resources import files
from pathlib import Path

from keel import config_load
from keel.config import TrainConfig
from keel.loop import train
from keel.monitor.runlog import RunSummary
from keel.runs import load_run

LORA_LR = 2e-3
"""An adapter takes a higher rate than the weights it stands in for (here 2.5e-4): it has fewer, and half start at 0."""


def quickstart(sets: list[str]) -> TrainConfig:
    """The quickstart's recipe with `sets` on top."""
    text = files("keel.recipes").joinpath("quickstart.toml").read_text(encoding="utf-8")
    return config_load.parse(text, "quickstart.toml", sets)


def warm_up(preset: str, out: Path, seed: int, sets: list[str]) -> Path:
    """The weights of a full-weight warm start; made once, and taken over if they are there."""
    run_dir = out / f"warm-{preset}-{seed}"
    if not (run_dir / "summary.json").exists():
        own = [f"seed={seed}", f"run_dir={str(run_dir)!r}", f"model.tiny.preset={preset!r}", "steps=0"]
        train(quickstart([*own, *sets]))
    return load_run(run_dir).weights()


def reinforce(preset: str, weights: Path, out: Path, seed: int, rank: int, sets: list[str]) -> RunSummary:
    """Reinforcement from `weights`; rank 0 is of full weights, to compare with."""
    run_dir = out / f"{'lora' if rank else 'full'}-{preset}-{seed}"
    own = [
        f"seed={seed}",
        f"run_dir={str(run_dir)!r}",
        'model.tiny.preset=""',
        f"model.path={str(weights)!r}",
        f"model.lora.rank={rank}",
        "warm_start.steps=0",
    ]
    rate = [f"optim.lr={LORA_LR}"] if rank else []
    return train(quickstart([*own, *rate, *sets]))


def main() -> None:
    """Both runs, one after the other; prints the rewards of the second, first to last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("gpt_oss", "qwen3", "qwen3_moe"), default="gpt_oss")
    parser.add_argument("--rank", type=int, default=16, help="0: full weights, to compare with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/lora"))
    parser.add_argument("--set", dest="sets", action="append", default=[], help="an option of both runs")
    parser.add_argument("--set-warm", action="append", default=[], help="an option of the warm start")
    parser.add_argument("--set-lora", action="append", default=[], help="an option of the second run")
    given = parser.parse_args()
    weights = warm_up(given.preset, given.out, given.seed, [*given.sets, *given.set_warm])
    second = [*given.sets, *given.set_lora]
    summary = reinforce(given.preset, weights, given.out, given.seed, given.rank, second)
    run = load_run(summary.run_dir)
    rewards = [row["reward/mean"] for row in run.rows_of("step")]
    sys.stdout.write(
        json.dumps({"run": str(summary.run_dir), "rewards": rewards, "eval": summary.eval}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
