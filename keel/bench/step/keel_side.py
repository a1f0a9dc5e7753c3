"""Keel's steps: the loop's own functions on the parts that `keel train` builds, with every default left as it is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from keel.bench.measure import forget_peak, peak_resident_bytes
from keel.bench.step import work as given
from keel.bench.step.side import Gate, Report
from keel.bench.step.work import NUM_ATTEMPTS, NUM_PROMPTS, Work
from keel.build import Parts, build
from keel.config import (
    ChatConfig,
    CheckpointConfig,
    LearnerConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    TrainConfig,
)
from keel.envs.base import Split
from keel.envs.tool_env import ToolEnv
from keel.loop import close_step, train_step
from keel.monitor.runlog import RunLog
from keel.rewards.base import Score
from keel.types import Message, Task, Trajectory

MORE_STEPS_THAN_ANYBODY_TAKES = 10_000
LR = 1e-6
NUM_OPERATORS = 15


class CountingEnv(ToolEnv):
    """Asks one of the prompts, answers calls, and rewards as `work.reward_of` does."""

    def __init__(self, prompts: Sequence[str], *, with_tool: bool) -> None:
        super().__init__(tools=[given.look] if with_tool else [])
        self._prompts = prompts

    def tasks(self, split: Split) -> Sequence[Task]:
        prompts = self._prompts if split == "train" else ()
        return [Task(id=f"{number}", data={"prompt": prompt}) for number, prompt in enumerate(prompts)]

    def reset(self, task: Task) -> Sequence[Message]:
        return [Message("user", task.data["prompt"])]

    def score(self, answer: str) -> float:  # noqa: ARG002 (judged by its tokens, below)
        return 0.0

    def judge(self, trajectory: Trajectory, task: Task) -> Score:  # noqa: ARG002
        return Score(given.reward_of(tokens_after_prompt(trajectory)))


def tokens_after_prompt(trajectory: Trajectory) -> list[int]:
    """All tokens of the episode but its first prompt."""
    (segment,) = trajectory.segments
    return [token for span in segment.spans[1:] for token in span.token_ids]


def config_of(work: Work, model: Path, run_dir: Path, *, threads: int, check: bool) -> TrainConfig:
    """What `keel train` would be given; `check` is the recompute check, on by default and unknown to TRL."""
    longest = given.PROMPT_TOKENS + work.turns * (work.reply_tokens + given.PROMPT_TOKENS)
    return TrainConfig(
        name="bench",
        run_dir=str(run_dir),
        steps=MORE_STEPS_THAN_ANYBODY_TAKES,
        num_threads=threads,
        device="cpu",
        model=ModelConfig(path=str(model)),
        chat=ChatConfig(format="template"),
        rollout=RolloutConfig(
            groups_per_step=NUM_PROMPTS,
            group_size=NUM_ATTEMPTS,
            max_turns=work.turns,
            max_new_tokens=work.reply_tokens,
            max_sequence_tokens=longest,
        ),
        optim=OptimConfig(lr=LR, beta2=0.999),
        checkpoint=CheckpointConfig(every=0),
        learner=LearnerConfig() if check else LearnerConfig(recompute_every=0),
    )


@contextmanager
def opened(config: TrainConfig, work: Work) -> Iterator[tuple[RunLog, Parts]]:
    """The parts of a run, published to and about to take their first step."""
    prompts = (Path(config.model.path) / "prompts.txt").read_text(encoding="utf-8").splitlines()
    with (
        RunLog.open(config) as run,
        build(config, lambda: CountingEnv(prompts, with_tool=work.turns > 1), run) as parts,
        run.stage("reinforcement", config.steps),
    ):
        parts.publish()
        yield run, parts


def run_keel(gate: Gate, *, work: Work, model: str, run_dir: str, threads: int, check: bool) -> None:
    """Steps as `gate` asks for them, each reported as `Split` has it."""
    config = config_of(work, Path(model), Path(run_dir), threads=threads, check=check)
    before = forget_peak()
    with opened(config, work) as (run, parts):
        (stage,) = config.stages()
        report: Report = {"threads": torch.get_num_threads()}
        step = 0
        while gate.wait(report):
            begun = time.perf_counter()
            verdict = train_step(config, run, parts, stage, step)
            close_step(config, run, parts, stage, step + 1, verdict)
            took = time.perf_counter() - begun
            step += 1
            report = {**_reported(run), "step_s": took, "extra_bytes": peak_resident_bytes() - before}


def _reported(run: RunLog) -> Report:
    rows = map(json.loads, run.paths.metrics.read_text(encoding="utf-8").splitlines())
    row = [row for row in rows if row["kind"] == "step"][-1]
    return {
        "generate_s": row["time/rollout_wait_s"],
        "score_s": row["time/score_s"],
        "update_s": row["time/update_s"] + row["time/publish_s"],
        "loss_tokens": row["policy/loss_tokens"],
        "updates": 1 - row["policy/skipped"],
    }


def profile_keel(gate: Gate, *, work: Work, model: str, run_dir: str, threads: int) -> None:
    """Two steps to warm up, then one under torch's profiler, in all threads; reports "operators"."""
    config = config_of(work, Path(model), Path(run_dir), threads=threads, check=True)
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with opened(config, work) as (run, parts):
        (stage,) = config.stages()
        for step in range(2):
            train_step(config, run, parts, stage, step)
        begun = time.perf_counter()
        with torch.profiler.profile(experimental_config=everywhere) as profiled:
            train_step(config, run, parts, stage, 2)
        took_ms = 1e3 * (time.perf_counter() - begun)
        gate.wait({"operators": _operators(profiled, took_ms)})


def _operators(profiled: torch.profiler.profile, took_ms: float) -> list[Report]:
    """What has most time of its own, and what no operator has: Python, and the profiler itself."""
    own = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    inside = sum(event.self_cpu_time_total for event in own) / 1e3
    rows = [("(between operators)", None, max(0.0, took_ms - inside))]
    rows += [(event.key, event.count, event.self_cpu_time_total / 1e3) for event in own[:NUM_OPERATORS]]
    return [
        {"operator": name, "calls": calls, "own_ms": round(own_ms, 1), "share": round(own_ms / took_ms, 3)}
        for name, calls, own_ms in rows
    ]
