"""Synthetic run directories for the report: as long, as broken and as hostile as real ones may be, in seconds.

    python tests/report_runs.py OUT [NAME ..]     names below; without any, all of them

Everything is written through the rooms that write real runs, except for the numbers, which are made up. Records of a
long run are a few different ones under many names (hard links), so that 1,000 steps of 256 episodes need seconds and
some megabytes.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parents[1]))  # for use as a script
from keel import config_load
from keel.monitor.rows import SCHEMA_VERSION, plain_numbers, write_json, write_text
from keel.monitor.wilson import success_metrics
from keel.rollouts.store import write_step_record, write_trajectories
from keel.types import Message, SamplingSettings, Segment, Task, TokenSpan, Trajectory, Turn
from tests.hostile import HOSTILE, SMALL

LONGEST = 250_000
"""Characters of the longest hostile text: far more than a page shows of one."""
START_S = 1_795_000_000.0
SPECIAL = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>")
SAMPLING = SamplingSettings()
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A run to write. `bend` changes a reinforcement row before it is written, given its step."""

    steps: int
    done: int | None = None  # steps finished; None: all
    warm_steps: int = 40
    groups: int = 16
    group_size: int = 16
    recorded: int = 8  # different records; the others are links to them
    record_every: int = 1  # 0: none
    state: str = "completed"
    reason: str = ""
    turns: int = 2
    long_words: int = 0  # extra words in the first reply of every eighth episode
    evals: tuple[tuple[str, int, float], ...] = (("after_warm_start", 0, 0.31), ("final", -1, 0.93))
    bend: Callable[[int, Row], None] = lambda step, row: None
    alarms: tuple[tuple[int, str, str, str], ...] = ()  # step, rule, severity, text
    texts: Sequence[str] = ()  # foreign texts for tasks, replies and tools
    failed_every: int = 37  # every so many attempts the world fails
    gap: float = 2e-7
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> int:
        return self.steps if self.done is None else self.done


def write_run(path: Path, plan: Plan, seed: int = 0) -> Path:
    """Write the run; the directory must be new."""
    draw = random.Random(seed)
    for name in ("steps", "trajectories", "checkpoints", "model"):
        (path / name).mkdir(parents=True)
    tokenizer = make_tokenizer(plan.texts)
    tokenizer.save(str(path / "model" / "tokenizer.json"))
    sets = [f"seed={seed}", f"steps={plan.steps}", f"warm_start.steps={plan.warm_steps}", 'env.id="CalculatorEnv"']
    sets += ['name="synthetic"', 'model.tiny.preset="gpt_oss"', f"record.every={plan.record_every}"]
    sets += [f"{name}={value}" for name, value in plan.config.items()]
    write_text(path / "config.toml", config_load.dump(config_load.load(None, sets)))
    packages = {"keel-rl": "0.1.0", "torch": "2.13.0", "transformers": "5.19.0"}
    write_json(path / "environment.json", {"python": "3.11.7", "packages": packages, "threads": 2, "device": "cpu"})
    seconds = write_rows(path / "metrics.jsonl", plan, draw)
    if plan.record_every:
        write_records(path, plan, tokenizer, draw)
    write_ending(path, plan, seconds)
    return path


def write_rows(path: Path, plan: Plan, draw: random.Random) -> float:
    """metrics.jsonl; returns the time of the last row."""
    now, lines = START_S, []
    evals = {(step if step >= 0 else plan.steps): (name, rate) for name, step, rate in plan.evals}
    alarms: dict[int, list[tuple[str, str, str]]] = {}
    for step, rule, severity, text in plan.alarms:
        alarms.setdefault(step, []).append((rule, severity, text))

    def add(head: Row, metrics: Row) -> None:
        lines.append({**head, "unix_s": now, **plain_numbers(metrics)})

    def evaluation(step: int) -> None:
        name, rate = evals[step]
        found = success_metrics(round(rate * 512), 512)
        metrics = {f"eval/{key}": value for key, value in found.items()} | {"eval/reward": rate, "eval/failed": 0.0}
        for k in (1, 4):
            low, high = found["success_low"], found["success_high"]
            metrics |= {f"eval/pass@{k}": 1 - (1 - rate) ** k}
            metrics |= {f"eval/pass@{k}_low": 1 - (1 - low) ** k, f"eval/pass@{k}_high": 1 - (1 - high) ** k}
        head = {"kind": "eval", "name": name, "step": plan.warm_steps + step, "train_step": plan.warm_steps + step}
        add(head, metrics)

    for step in range(plan.warm_steps):
        now += 0.15
        add({"kind": "step", "stage": "warm_start", "step": step, "train_step": step + 1}, warm_row(step, plan, draw))
    for step in range(plan.finished):
        if step in evals:
            now += 4.0
            evaluation(step)
        now += 2.3
        row = reinforcement_row(step, plan, draw)
        plan.bend(step, row)
        train_step = plan.warm_steps + step + 1
        add({"kind": "step", "stage": "reinforcement", "step": step, "train_step": train_step}, row)
        if step < len(plan.texts):
            token = {"where": plan.texts[step], "position": step, "rollout_logprob": -1.0, "learner_logprob": -1.5}
            token |= {"gap": -0.5 - step, "text": plan.texts[step], "before": plan.texts[step]}
            place = {"stage": "reinforcement", "step": step, "train_step": train_step}
            lines.append({"kind": "worst_tokens", "unix_s": now, "tokens": [token], **place})
        for rule, severity, text in alarms.get(step, ()):
            place = {"stage": "reinforcement", "step": step, "train_step": train_step, "first_step": step}
            lines.append({"kind": "alarm", "unix_s": now, "rule": rule, "severity": severity, "text": text, **place})
    if plan.finished in evals and plan.state == "completed":
        now += 4.0
        evaluation(plan.finished)
    text = "".join(json.dumps({"schema_version": SCHEMA_VERSION, **line}) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")  # as `append_row`, without waiting for the disk after each
    return now


def warm_row(step: int, plan: Plan, draw: random.Random) -> Row:
    fade = math.exp(-6 * step / max(1, plan.warm_steps))
    return {
        "reward/mean": 0.5 + draw.uniform(-0.1, 0.1),
        "rollout/episodes": 32.0,
        "rollout/failed": 0.0,
        "policy/loss": 0.3 + 6 * fade + draw.uniform(0, 0.05),
        "policy/entropy": 0.4 + 5 * fade,
        "policy/ratio_max_dev": 0.0,
        "policy/recompute_max_dev": 0.0,
        "policy/clip_fraction": 0.0,
        "policy/grad_norm": 0.4 + 9 * fade,
        "policy/skipped": 0.0,
        "time/rollout_wait_s": 0.005,
        "time/learn_s": 0.14,
        "time/publish_s": 0.0004,
        "time/step_s": 0.1455,
    }


def reinforcement_row(step: int, plan: Plan, draw: random.Random) -> Row:
    part = step / max(1, plan.steps)
    reward = min(1.0, 0.3 + 0.65 * (1 - math.exp(-4 * part)) + draw.gauss(0, 0.02))
    gap = plan.gap * draw.uniform(0.8, 1.2)
    rollout = 1.2 + draw.uniform(0, 0.2)
    return {
        "reward/mean": reward,
        "success": reward,
        "rollout/episodes": float(plan.groups * plan.group_size),
        "rollout/groups": float(plan.groups),
        "rollout/failed": 0.0,
        "rollout/env_error": 0.0,
        "rollout/env_timeout": 0.0,
        "rollout/engine_error": 0.0,
        "rollout/malformed": float(draw.randrange(3)),
        "rollout/truncated": float(draw.randrange(2)),
        "rollout/turns": 1.9,
        "rollout/episode_tokens": 60.0 + draw.uniform(-3, 3),
        "rollout/signal_share": max(0.2, 0.95 - 0.7 * part),
        "rollout/tokens": 4_900.0,
        "rollout/tokens_per_s": 3_600.0 + draw.uniform(-200, 200),
        "advantage/groups": float(plan.groups),
        "advantage/zero_share": 0.1,
        "policy/loss": -0.25 * (1 - part) + draw.gauss(0, 0.02),
        "policy/entropy": 0.9 * math.exp(-1.5 * part) + draw.uniform(0, 0.03),
        "policy/loss_tokens": 4_900.0,
        "policy/ratio_max_dev": 0.0,
        "policy/recompute_max_dev": 0.0,
        "policy/clip_fraction": 0.0,
        "policy/grad_norm": 0.35 * math.exp(-part) + draw.uniform(0, 0.08),
        "policy/clip_factor": 1.0,
        "policy/lr": 2.5e-4,
        "policy/staleness": 0.0,
        "policy/skipped": 0.0,
        "policy/num_skipped": 0.0,
        "mismatch/abs_mean": gap,
        "mismatch/abs_max": gap * 9,
        "mismatch/k1": gap / 50,
        "mismatch/k3": gap * gap,
        "mismatch/outliers": 0.0,
        "mismatch/outliers_routed": 0.0,
        "time/rollout_s": rollout,
        "time/rollout_wait_s": rollout,
        "time/learn_s": 0.85,
        "time/publish_s": 0.004,
        "time/step_s": rollout + 0.86,
    }


def write_records(path: Path, plan: Plan, tokenizer: Tokenizer, draw: random.Random) -> None:
    """Step records and trajectories of all recorded steps: `plan.recorded` different ones, then links to these."""
    numbers = range(0, plan.finished, plan.record_every)
    made: list[int] = []
    for place, step in enumerate(numbers):
        names = (f"steps/{step:06d}.safetensors", f"trajectories/{step:06d}.jsonl")
        fresh = place * plan.recorded // max(1, len(numbers)) >= len(made)
        if fresh:
            made.append(step)
            trajectories = make_step(step, plan, tokenizer, draw)
            write_trajectories(path / names[1], trajectories)
            write_step_record(
                path / names[0], pack_streams(trajectories, draw), {"step": step, "stage": "reinforcement"}
            )
            continue
        source = made[-1]
        for name, kind in zip(names, ("steps", "trajectories"), strict=True):
            suffix = name.rpartition(".")[2]
            os.link(path / kind / f"{source:06d}.{suffix}", path / name)


def make_step(step: int, plan: Plan, tokenizer: Tokenizer, draw: random.Random) -> list[Trajectory]:
    chance = 0.3 + 0.65 * (1 - math.exp(-4 * step / max(1, plan.steps)))
    found = []
    for group in range(plan.groups):
        left, right = draw.randint(1, 99), draw.randint(1, 99)
        for attempt in range(plan.group_size):
            number = group * plan.group_size + attempt
            text = plan.texts[number % len(plan.texts)] if plan.texts else ""
            failed = plan.failed_every > 0 and number % plan.failed_every == plan.failed_every - 1
            right_answer = draw.random() < chance
            trajectory = make_trajectory(
                tokenizer, draw, step, group, attempt, (left, right), plan, text, right_answer, failed=failed
            )
            found.append(trajectory)
    return found


def make_trajectory(
    tokenizer: Tokenizer,
    draw: random.Random,
    step: int,
    group: int,
    attempt: int,
    terms: tuple[int, int],
    plan: Plan,
    text: str,
    right_answer: bool,
    *,
    failed: bool,
) -> Trajectory:
    left, right = terms
    answer = left + right if right_answer else left + right + draw.choice((-10, -1, 1, 10))
    question = f"What is {left} + {right}? {text}"
    padding = " and then" * plan.long_words if plan.long_words and attempt % 8 == 0 else ""
    call = f'{{"expression": "{left} + {right}"}}{padding}'
    final = f"{answer} \u2014 that\u2019s \U0001f9ee {text}"
    malformed = attempt % 11 == 10
    parts: list[tuple[bool, str]] = [
        (False, f"<|start|>user<|message|>{question}<|end|><|start|>assistant"),
        (True, f"<|channel|>commentary to=functions.calculator<|message|>{call}<|call|>"),
        (False, f"<|start|>functions.calculator<|message|>{left + right}{text}<|end|><|start|>assistant"),
        (True, f"<|channel|>final<|message|>{final}<|return|>"),
    ]
    if plan.turns == 1:
        parts = [parts[0], parts[3]]
    spans = tuple(span(tokenizer, draw, own, words, step) for own, words in parts)
    tool = Message("assistant", call, channel="commentary", recipient="functions.calculator", content_type="json")
    said = Message("assistant", final, channel="final")
    seconds = {"generate_s": 0.11, "env_s": 0.02}
    turns = [
        Turn(
            (tool,),
            parts[1][1],
            "stop",
            0,
            1,
            observation=(Message("tool", f"{left + right}{text}", name=text[:60] or None),),
            **seconds,
        ),
        Turn((said,), parts[-1][1], "stop", 0, 3, malformed=f"no channel: {text}" if malformed else None, **seconds),
    ]
    return Trajectory(
        task=Task(f"{left}+{right}", {"question": question, "answer": left + right}),
        group_id=f"{step:06d}.{group:03d}",
        attempt=attempt,
        prompt=(Message("user", question),),
        turns=tuple(turns[-1:] if plan.turns == 1 else turns),
        segments=(Segment(spans),),
        status="env_error" if failed else "completed",
        reward=float(right_answer),
        reward_parts={"exact": float(right_answer)},
        success=right_answer,
        error=f"RuntimeError: the calculator is out {text}" if failed else None,
        metrics={"tool_calls": float(plan.turns - 1)},
    )


def span(tokenizer: Tokenizer, draw: random.Random, own: bool, words: str, version: int) -> TokenSpan:
    clean = words.encode("utf-8", "replace").decode()
    ids = tuple(tokenizer.encode(clean, add_special_tokens=False).ids)
    if not own:
        return TokenSpan(ids, "context")
    return TokenSpan(ids, "policy", tuple(-draw.expovariate(4.0) for _ in ids), version, SAMPLING)


def pack_streams(trajectories: Sequence[Trajectory], draw: random.Random) -> dict[str, np.ndarray]:
    """Streams of a step as `keel.records` lays them out: row t feeds input t and speaks of the token after it."""
    noise = np.random.default_rng(draw.randrange(2**32))
    kept = [trajectory for trajectory in trajectories if not trajectory.failed]
    groups = {name: index for index, name in enumerate(dict.fromkeys(each.group_id for each in trajectories))}
    means = {name: np.mean([each.reward for each in kept if each.group_id == name] or [0.0]) for name in groups}
    columns: dict[str, list[Any]] = {
        name: []
        for name in ("input_ids", "labels", "loss_mask", "policy_version", "turn", "rollout_logprobs", "advantages")
    }
    bounds = [0]
    for trajectory in kept:
        about: list[tuple[int, bool, int, int, float]] = []
        turn = -1
        for part in trajectory.segments[0]:
            own = part.origin == "policy"
            turn += own
            logprobs = part.logprobs or (0.0,) * len(part)
            version = -1 if part.policy_version is None else part.policy_version
            about += [
                (token, own, version, turn if own else -1, value)
                for token, value in zip(part.token_ids, logprobs, strict=True)
            ]
        columns["input_ids"] += [each[0] for each in about[:-1]]
        for name, place in (
            ("labels", 0),
            ("loss_mask", 1),
            ("policy_version", 2),
            ("turn", 3),
            ("rollout_logprobs", 4),
        ):
            columns[name] += [each[place] for each in about[1:]]
        advantage = trajectory.reward - means[trajectory.group_id]
        columns["advantages"] += [advantage if each[1] else 0.0 for each in about[1:]]
        bounds.append(len(columns["labels"]))
    mask = np.asarray(columns["loss_mask"], dtype=bool)
    rollout = np.asarray(columns["rollout_logprobs"], dtype=np.float32)
    rows = len(mask)
    context = -noise.exponential(8.0, rows).astype(np.float32)
    drawn = rollout + noise.normal(0, 2e-7, rows).astype(np.float32)
    return {
        "input_ids": np.asarray(columns["input_ids"], dtype=np.int64),
        "labels": np.asarray(columns["labels"], dtype=np.int64),
        "positions": np.concatenate([np.arange(stop - start) for start, stop in pairwise(bounds)]),
        "loss_mask": mask,
        "policy_version": np.asarray(columns["policy_version"], dtype=np.int32),
        "turn": np.asarray(columns["turn"], dtype=np.int32),
        "temperature": np.ones(rows, dtype=np.float32),
        "rollout_logprobs": rollout,
        "logprobs": np.where(mask, drawn, context),
        "entropy": noise.exponential(0.4, rows).astype(np.float32),
        "advantages": np.asarray(columns["advantages"], dtype=np.float32),
        "cu_seqlens": np.asarray(bounds, dtype=np.int64),
        "micro_batch_bounds": np.asarray([0, rows], dtype=np.int64),
        "update_bounds": np.asarray([0, 1], dtype=np.int64),
        "sequence_to_trajectory": np.arange(len(kept), dtype=np.int64),
        "sequence_to_segment": np.zeros(len(kept), dtype=np.int64),
        "trajectory_to_group": np.asarray([groups[each.group_id] for each in kept], dtype=np.int64),
        "rewards": np.asarray([each.reward for each in kept], dtype=np.float32),
    }


def make_tokenizer(texts: Sequence[str] = ()) -> Tokenizer:
    """A byte-level vocabulary of 500 tokens and Harmony's marks: some characters are of several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    corpus = ["What is the answer? user assistant commentary to=functions.calculator final expression"] * 4
    tokenizer.train_from_iterator(
        [*corpus, *(text[:200].encode("utf-8", "replace").decode() for text in texts)], trainer
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return tokenizer


def write_ending(path: Path, plan: Plan, now: float) -> None:
    ended = plan.state in ("completed", "stopped", "interrupted", "failed")
    status = {
        "state": plan.state,
        "reason": plan.reason,
        "stage": "" if ended else "reinforcement",
        "steps_done": {"warm_start": plan.warm_steps, "reinforcement": plan.finished},
        "steps": plan.steps,
        "heartbeat_unix_s": now,
        "pid": 1,
    }
    write_json(path / "status.json", status)
    (path / ".lock").touch()
    if ended:
        summary = {"run_dir": str(path), "state": plan.state, "reason": plan.reason, "steps": plan.finished, "eval": {}}
        write_json(path / "summary.json", {**summary, "seconds": {"reinforcement": now - START_S}})


@contextmanager
def held(path: Path) -> Iterator[None]:
    """While it lasts a run whose status says "running" is one: this process holds its directory."""
    with (path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def broken_rows(step: int, row: Row) -> None:
    """From step 120 engine and learner part, from 160 entropy and reward fall, from 215 nothing is a number."""
    if step >= 120:
        row["mismatch/abs_mean"] = min(0.4, 2e-7 * 1.12 ** (step - 118))
        row["mismatch/abs_max"] = row["mismatch/abs_mean"] * 20
        row["mismatch/outliers"] = 40.0
    if step >= 160:
        fall = math.exp(-(step - 160) / 12)
        row["policy/entropy"] *= fall
        row["reward/mean"] = row["success"] = row["reward/mean"] * fall
        row["rollout/signal_share"] *= fall
    if step >= 215:
        row["policy/grad_norm"] = row["policy/loss"] = math.nan
        row["policy/skipped"] = 1.0


def tear(path: Path) -> None:
    """What a kill leaves: a torn row, a half-written record, one damaged and one missing."""
    with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"schema_version": 1, "kind": "step", "stage": "reinfor')
    (path / "steps" / ".000138.safetensors.tmp").write_bytes(b"\x00" * 100)
    damaged = path / "steps" / "000130.safetensors"
    half = damaged.read_bytes()[:5_000]
    damaged.unlink()  # it may be one of many names of a record
    damaged.write_bytes(half)
    (path / "trajectories" / "000131.jsonl").unlink()


THOUSAND = Plan(
    1_000,
    warm_steps=200,
    evals=(("initial", 0, 0.02), ("step_250", 250, 0.62), ("step_500", 500, 0.85), ("final", -1, 0.96)),
    alarms=((3, "no_signal", "warn", "7 % of groups carry a signal; 10 % or more are wanted"),),
)
CRASHED = Plan(300, done=138, recorded=4, state="running", groups=8, group_size=8)
BROKEN = Plan(
    400,
    done=220,
    recorded=6,
    groups=8,
    group_size=8,
    state="stopped",
    reason="loss is nan and gradient norm is nan; 5 updates in a row were skipped",
    bend=broken_rows,
    alarms=(
        (131, "mismatch", "warn", "engine and learner differ by more than float32 explains"),
        (215, "not_finite", "skip", "loss is nan and gradient norm is nan"),
        (219, "not_finite", "stop", "loss is nan and gradient norm is nan; 5 updates in a row were skipped"),
    ),
)
HOSTILE_RUN = Plan(
    6,
    recorded=2,
    warm_steps=5,
    groups=4,
    group_size=12,
    texts=(*SMALL.values(), HOSTILE["huge"][:LONGEST]),
    alarms=tuple(
        (place, name, "warn", text[:5_000]) for place, (name, text) in enumerate(HOSTILE.items()) if place < 6
    ),
    reason=HOSTILE["script_end"],
)
PLANS: dict[str, Plan] = {
    "thousand": THOUSAND,
    "crashed": CRASHED,
    "broken": BROKEN,
    "running": replace(CRASHED, recorded=3),
    "hostile": HOSTILE_RUN,
    "long": Plan(20, groups=2, group_size=8, long_words=6_000, recorded=2, warm_steps=0),
    "other_seed": Plan(300, recorded=3, groups=8, group_size=8, config={"optim.lr": 5e-4}),
    "small": Plan(4, groups=2, group_size=4, warm_steps=2, recorded=2),
    "no_records": Plan(60, record_every=0),
    "empty": Plan(10, done=0, warm_steps=0, evals=(), state="starting"),
}


def write_named(out: Path, name: str) -> Path:
    """Write one of `PLANS` to OUT/NAME. A "running" one runs only while `held`."""
    path = write_run(out / name, PLANS[name], seed=1 if name == "other_seed" else 0)
    if name == "crashed":
        tear(path)
    return path


def main(arguments: Sequence[str]) -> None:
    if not arguments or set(arguments[1:]) - set(PLANS):
        sys.exit(f"usage: python tests/report_runs.py OUT [NAME ..]; names: {', '.join(PLANS)}")
    for name in arguments[1:] or PLANS:
        print(write_named(Path(arguments[0]), name))


if __name__ == "__main__":
    main(sys.argv[1:])
