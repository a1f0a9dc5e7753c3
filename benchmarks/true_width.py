"""One whole training step of a slice of GPT-OSS at its true width, on a CPU.

    python -m benchmarks.true_width --json benchmarks/results/true_width.json

Hidden 2,880, 64 query and 8 key heads, 8 experts of which 4 run, two layers (one with a window), 32,000 tokens in the
vocabulary, bfloat16 with float32 masters: rollouts, packing, scoring, gradient, optimizer step, publishing. What is at
stake at this width and not at a small one is rounding: the engine's products have other shapes than the learner's, and
sums over 2,880 numbers in bfloat16 differ with the shape.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from keel.bench.measure import BenchResult, forget_peak, machine, peak_resident_bytes
from keel.build import build
from keel.config import TrainConfig
from keel.envs.load import env_factory
from keel.loop import train_step
from keel.models.info import count_parameters
from keel.models.tiny import build_tiny_model, build_tiny_tokenizer
from keel.monitor.runlog import RunLog
from keel.runs import load_run
from keel.tiny_start import texts_to_learn
from keel.types import Task, Trajectory

COMMAND = "python -m benchmarks.true_width --json benchmarks/results/true_width.json"
WIDTH = {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
}
VOCAB_SIZE = 32_000
NOTE = (
    "one step of the whole loop: hidden 2,880, 64 / 8 heads, 8 experts of which 4, 2 layers, V = 32,000, bfloat16 with "
    "float32 masters; figures as in metrics.jsonl (loop.md), mismatch/* in nats"
)
ENV = {
    "id": "CalculatorEnv",
    "options": {"tasks_of": ["chain_sum"], "num_tasks": 300},
    "reward": "benchmarks.true_width:of_first_token",
}
FIGURES = (
    "policy/ratio_max_dev",
    "policy/recompute_max_dev",
    "mismatch/abs_mean",
    "mismatch/abs_max",
    "mismatch/k3",
    "mismatch/route_disagreement",
    "mismatch/route_diff",
    "correction/ess",
    "policy/loss",
    "policy/grad_norm",
    "learner/tokens",
    "learner/shared_tokens",
    "learner/tflop",
    "perf/tokens_per_s",
    "rollout/tokens",
    "time/rollout_s",
    "time/score_s",
    "time/update_s",
    "time/learn_s",
    "time/publish_s",
    "time/step_s",
)


def of_first_token(trajectory: Trajectory, task: Task) -> float:  # noqa: ARG001 (a reward's signature)
    """A random model solves nothing: attempts are told apart by what they drew first, so that there is a gradient."""
    return float(trajectory.segments[0].spans[-1].token_ids[0] % 7)


def build_model(path: Path) -> None:
    """The slice, freshly initialized; of its vocabulary a tokenizer of the environment's own words uses the first."""
    small = TrainConfig.model_validate({"model": {"tiny": {"preset": "gpt_oss"}}, "env": ENV})
    texts = list(texts_to_learn(small, env_factory(small.env), "harmony"))
    tokenizer = build_tiny_tokenizer(texts, 500, style="harmony", across_words=True)
    build_tiny_model("gpt_oss", path, tokenizer=tokenizer, vocab_size=VOCAB_SIZE, **WIDTH)


def config_of(run_dir: Path, attempts: int, new_tokens: int) -> TrainConfig:
    """One step of one group of `attempts`; the embedded engine samples from the learner's own weights."""
    return TrainConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "steps": 1,
            "device": "cpu",
            "model": {"dtype": "bfloat16", "path": str(run_dir.with_name("model"))},
            "env": ENV,
            "rollout": {
                "groups_per_step": 1,
                "group_size": attempts,
                "max_turns": 1,
                "max_new_tokens": new_tokens,
                "max_sequence_tokens": 512,
            },
            "engine": {"slots": 16, "prefill_tile": 128},
            "batch": {"max_tokens": 4096},
            "algo": {"correction": {"id": "token_truncated"}},
            "log": {"live": "off"},
            "report": {"every_s": 0, "at_end": False},
        }
    )


def one_step(run_dir: Path, attempts: int, new_tokens: int) -> dict[str, Any]:
    """Build the model and take the step; its figures, and the most memory that was resident from loading on."""
    build_model(run_dir.with_name("model"))
    config = config_of(run_dir, attempts, new_tokens)
    (stage,) = config.stages()
    with RunLog.open(config) as run, build(config, None, run) as parts:
        parts.publish()
        with run.stage(stage.name, stage.num_steps):
            forget_peak()
            train_step(config, run, parts, stage, 0)
            peak = peak_resident_bytes()
    (row,) = load_run(run_dir).rows_of("step")
    return {
        "case": f"{attempts} attempts, {new_tokens} new tokens",
        "parameters": count_parameters(run_dir.with_name("model")),
        "peak_mib": round(peak / 2**20),
        **{name: row.get(name) for name in FIGURES},
    }


def main() -> None:
    """Print the figures; with --json write them too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="keel-true-width-") as directory:
        figures = one_step(Path(directory) / "run", options.attempts, options.new_tokens)
    for name, value in figures.items():
        print(f"{name:30} {value}")  # noqa: T201 (this is what it is for)
    if options.json is not None:
        rows = [{"figure": name, "value": value} for name, value in figures.items()]
        BenchResult("true_width", COMMAND, facts, rows, (NOTE,)).write(options.json)


if __name__ == "__main__":
    main()
