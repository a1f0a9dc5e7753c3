"""An environment that raises in 20 % and hangs in 5 % of its steps: rollouts complete, no failure becomes a zero."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import pytest

from keel.batch import pack
from keel.chat.base import Reply
from keel.chat.harmony import HarmonyChat
from keel.config import EngineConfig, EnvConfig, RolloutConfig
from keel.engines.embedded.engine import EmbeddedEngine
from keel.envs.base import Env, Step
from keel.loop import train
from keel.models.policy import PolicyModel
from keel.models.tiny import build_tiny_model, build_tiny_tokenizer
from keel.rollouts.collector import Collector
from keel.rollouts.store import read_step_record, read_trajectories
from keel.types import Group, Message, Routes, Task, Trajectory

RAISES, HANGS = 0.20, 0.05
TURNS = 3
GROUPS, SIZE, STEPS = 6, 8, 2

Collect = Callable[[int], tuple[list[list[Group]], list[dict[str, float]]]]


class Unreliable(Env):
    """Three steps, then reward 1. What goes wrong is decided by task, turn and reply, so every run fails alike."""

    release = threading.Event()
    raised: ClassVar[list[str]] = []
    hung: ClassVar[list[str]] = []

    def tasks(self, split: str) -> Sequence[Task]:
        return [Task(f"t{number}", {"number": number}) for number in range(20)]

    def reset(self, task: Task) -> Sequence[Message]:
        self.task = task
        self.turn = 0
        return [Message("user", f"Say something about {task.data['number']}.")]

    def step(self, reply: Reply) -> Step:
        self.turn += 1
        key = f"{self.task.id}/{self.turn}/{reply.text}"
        chance = int.from_bytes(blake2b(key.encode(), digest_size=4).digest(), "big") / 2**32
        if chance < RAISES:
            self.raised.append(key)
            raise RuntimeError("the world broke")
        if chance < RAISES + HANGS:
            self.hung.append(key)
            self.release.wait()
        done = self.turn == TURNS
        return Step(() if done else (Message("user", "Go on."),), reward=1.0 if done else 0.0, done=done, success=done)


@pytest.fixture
def world() -> Iterator[type[Unreliable]]:
    Unreliable.release.clear()
    Unreliable.raised.clear()
    Unreliable.hung.clear()
    yield Unreliable
    Unreliable.release.set()


class HastyChat(HarmonyChat):
    """Lets every third token end a reply, so that an untrained model has episodes of several turns."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return tuple(range(0, 270, 3))


TOKENIZER = build_tiny_tokenizer(["Say something about 1. Go on."], style="harmony")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build_tiny_model("gpt_oss", path, tokenizer=TOKENIZER, seed=0)
    return path


@pytest.fixture(scope="module")
def collect(model_path: Path) -> Collect:
    policy = PolicyModel.load(model_path)
    chat = HastyChat(TOKENIZER, system_message="none")

    def run(max_staleness: int) -> tuple[list[list[Group]], list[dict[str, float]]]:
        config = RolloutConfig(
            groups_per_step=GROUPS,
            group_size=SIZE,
            max_new_tokens=16,
            max_sequence_tokens=256,
            max_staleness=max_staleness,
        )
        engine = EmbeddedEngine(policy, EngineConfig(slots=16), max_sequence_tokens=256)
        steps, metrics = [], []
        env = EnvConfig(step_timeout_s=0.5)
        with Collector(engine, Unreliable, chat, config, env, seed=3, num_steps=STEPS) as collector:
            for step in range(STEPS):
                steps.append(collector.next_groups(step))
                metrics.append(dict(collector.metrics))
            collector.loop.run(engine.close())
        return steps, metrics

    return run


def every(steps: list[list[Group]]) -> list[Trajectory]:
    return [trajectory for groups in steps for group in groups for trajectory in group.trajectories]


def test_failures_are_counted_and_never_become_a_reward(collect: Collect, world: type[Unreliable]) -> None:
    steps, metrics = collect(0)
    trajectories = every(steps)
    assert len(trajectories) == GROUPS * SIZE * STEPS

    # Every failure of the world is there, under its own name, and nothing else is.
    num_raised, num_hung = len(world.raised), len(world.hung)
    assert num_raised > 20
    assert num_hung > 3
    assert sum(t.status == "env_error" for t in trajectories) == num_raised
    assert sum(t.status == "env_timeout" for t in trajectories) == num_hung
    assert {t.status for t in trajectories} <= {"env_error", "env_timeout", "completed", "truncated"}
    assert sum(row["rollout/env_error"] for row in metrics) == num_raised
    assert sum(row["rollout/env_timeout"] for row in metrics) == num_hung
    assert sum(row["rollout/failed"] for row in metrics) == num_raised + num_hung

    # This world pays 1 to every episode that ends by itself: any other reward among them would be a made-up one.
    kept = [t for groups in steps for group in groups for t in group.kept]
    assert len(kept) == len(trajectories) - num_raised - num_hung
    completed = [t for t in kept if t.status == "completed"]
    assert len(completed) > 20
    assert {(t.reward, t.success, len(t.turns)) for t in completed} == {(1.0, True, TURNS)}
    assert all(t.error for t in trajectories if t.failed)

    # What is learned from is exactly what was kept.
    for groups in steps:
        batch = pack(groups, max_tokens=2048)
        assert list(batch.trajectory_ids) == [f"{t.group_id}/{t.attempt}" for group in groups for t in group.kept]
        assert batch.rewards.tolist() == [t.reward for group in groups for t in group.kept]


def test_every_token_that_was_fed_has_its_routes(collect: Collect, world: type[Unreliable]) -> None:
    steps, _ = collect(0)
    for trajectory in every(steps):
        for segment in trajectory.segments:
            routes = Routes.join([span.routed_experts for span in segment if span.routed_experts is not None])
            rows = [routes.rows(i, i + 1).data for i in range(routes.num_tokens)]
            missing = Routes.missing(1, routes.num_layers, routes.top_k).data
            assert routes.num_tokens == len(segment)
            assert [i for i, row in enumerate(rows) if row == missing] == [len(segment) - 1]


def test_what_fails_does_not_depend_on_timing(collect: Collect, world: type[Unreliable]) -> None:
    synchronous, ahead = (
        [(t.group_id, t.attempt, t.status, t.reward, t.segments) for t in every(collect(max_staleness)[0])]
        for max_staleness in (0, 1)
    )
    assert synchronous == ahead


class Paying(Unreliable):
    """Pays 1 to 2 for every step, by the reply's text: who earns nothing has failed, and attempts differ."""

    def step(self, reply: Reply) -> Step:
        step = super().step(reply)
        digest = blake2b(f"{self.task.id}/{reply.text}".encode(), digest_size=1).digest()
        return replace(step, reward=1.0 + digest[0] / 256)


def test_a_run_goes_on_and_learns_from_what_was_kept(
    tmp_path: Path, model_path: Path, make_config: Callable[..., Any], world: type[Unreliable]
) -> None:
    """Two training steps: failures are counted in the rows, told in the trajectories, absent from the records."""
    config = make_config(
        tmp_path / "run",
        steps=STEPS,
        model={"path": str(model_path)},
        chat={"system_message": "none"},
        env={"step_timeout_s": 0.5},
        rollout={"groups_per_step": GROUPS, "group_size": SIZE, "max_new_tokens": 12},
        eval={"num_tasks": 0},
    )
    assert train(config, Paying).state == "completed"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert sum(row["rollout/env_error"] for row in rows) == len(world.raised) > 5
    assert sum(row["rollout/env_timeout"] for row in rows) == len(world.hung) > 0

    for step, row in enumerate(rows):
        path = tmp_path / "run" / "trajectories" / f"{step:06d}.jsonl"
        trajectories = read_trajectories(path)
        kept = [t for t in trajectories if not t.failed]
        assert len(trajectories) == GROUPS * SIZE == row["rollout/episodes"]
        assert {t.status for t in trajectories} <= {"env_error", "env_timeout", "completed", "truncated"}
        for status in ("env_error", "env_timeout"):
            assert sum(t.status == status for t in trajectories) == row[f"rollout/{status}"]
        assert len(trajectories) - len(kept) == row["rollout/failed"]
        assert all(t.reward >= 1.0 for t in kept)

        streams, _ = read_step_record(tmp_path / "run" / "steps" / f"{step:06d}.safetensors")
        assert streams["rewards"].tolist() == pytest.approx([t.reward for t in kept])
        groups = sorted({t.group_id for t in trajectories})
        assert streams["trajectory_to_group"].tolist() == [groups.index(t.group_id) for t in kept]
        assert sorted(set(streams["sequence_to_trajectory"].tolist())) == list(range(len(kept)))
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        drawn = [line["num_policy_tokens"] for line in lines if not line["status"].startswith("env_")]
        assert int(streams["loss_mask"].sum()) == sum(drawn) == row["policy/loss_tokens"]
        assert row["reward/mean"] == pytest.approx(sum(t.reward for t in kept) / len(kept))
        assert row["policy/grad_norm"] > 0
