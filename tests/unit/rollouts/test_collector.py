"""Scheduling: the same groups whatever the timing, positions that resume, failures that stay out of statistics."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from keel.config import EnvConfig, RolloutConfig
from keel.engines.base import EngineError, GenerateRequest
from keel.envs.base import Env, Step
from keel.envs.load import env_factory
from keel.plugins import PluginError
from keel.rollouts.collector import Collector, RolloutError
from keel.rollouts.loop_thread import LoopThread
from keel.rollouts.metrics import max_staleness
from keel.rollouts.schedule import ScheduleError
from keel.types import Group, Message, Task

TASKS = [Task(f"t{i}", {"n": i}) for i in range(7)]


class Digits(Env):
    """Reward: the digit the agent says."""

    made = 0
    closed = 0

    def __init__(self) -> None:
        type(self).made += 1

    def tasks(self, split: str) -> Sequence[Task]:
        return TASKS if split == "train" else TASKS[:3]

    def reset(self, task: Task) -> Any:
        self.task = task
        return [Message("user", str(task.data["n"]))]

    def step(self, reply: Any) -> Step:
        value = int(reply.final)
        return Step(done=True, reward=float(value), success=value > 5)

    def close(self) -> None:
        type(self).closed += 1


class Untold(Digits):
    def tasks(self, split: str) -> Sequence[Task]:
        raise FileNotFoundError(f"no rows for {split}")


class Nothing(Digits):
    def tasks(self, split: str) -> Sequence[Task]:
        return []


class Misspelt(Env):
    def task(self, split: str) -> Sequence[Task]:
        return TASKS


def digit(request: GenerateRequest) -> str:
    return f"final:{request.seed % 10}"


def make(engine: Any, chat: Any, env: Any = Digits, **options: Any) -> Collector:
    names = ("seed", "num_steps", "updates_per_batch", "reward", "loop", "step_timeout_s")
    rest = {name: options.pop(name) for name in names if name in options}
    config = RolloutConfig(
        **{"groups_per_step": 3, "group_size": 4, "max_new_tokens": 20, "max_sequence_tokens": 100, **options}
    )
    env_config = EnvConfig(step_timeout_s=rest.pop("step_timeout_s", 60.0))
    return Collector(engine, env, chat, config, env_config, **{"seed": 1, **rest})


def outcome(groups: list[Group]) -> list[tuple[str, str, list[float]]]:
    return [(group.id, group.task.id, [t.reward for t in group.trajectories]) for group in groups]


def test_groups_are_complete_ordered_and_the_same_every_time(letter_chat: Any, replay_engine: Any) -> None:
    found = []
    for concurrency in (1, 5, 0):
        with make(replay_engine(digit), letter_chat(), concurrency=concurrency) as collector:
            found.append([outcome(collector.next_groups(step)) for step in range(4)])
    assert found[0] == found[1] == found[2]
    groups = found[0][2]
    assert [group[0] for group in groups] == ["000002.000", "000002.001", "000002.002"]
    assert all(len(group[2]) == 4 for group in groups)
    assert len({reward for group in groups for reward in group[2]}) > 2  # attempts have seeds of their own


def test_another_seed_draws_other_tasks_and_numbers(letter_chat: Any, replay_engine: Any) -> None:
    found = []
    for seed in (1, 2):
        with make(replay_engine(digit), letter_chat(), seed=seed) as collector:
            found.append(outcome(collector.next_groups(0)))
    assert found[0] != found[1]


def test_every_epoch_has_each_task_once(letter_chat: Any, replay_engine: Any) -> None:
    with make(replay_engine(digit), letter_chat(), groups_per_step=7, group_size=1) as collector:
        epochs = [[group.task.id for group in collector.next_groups(step)] for step in range(3)]
    assert all(sorted(epoch) == [task.id for task in TASKS] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_restored_collector_goes_on_as_if_it_had_not_stopped(letter_chat: Any, replay_engine: Any) -> None:
    with make(replay_engine(digit), letter_chat()) as collector:
        collector.next_groups(0)
        collector.next_groups(1)
        state = json.loads(json.dumps(collector.state()))
        whole = [outcome(collector.next_groups(step)) for step in (2, 3)]
    with make(replay_engine(digit), letter_chat()) as resumed:
        resumed.restore(state)
        assert [outcome(resumed.next_groups(step)) for step in (2, 3)] == whole
    with make(replay_engine(digit), letter_chat(), max_staleness=2) as stale:
        stale.next_groups(0)  # looks two steps ahead, which a restore must forget
        stale.restore(state)
        assert [outcome(stale.next_groups(step)) for step in (2, 3)] == whole


def test_a_restored_collector_forgets_what_it_had_begun_with_other_weights(
    letter_chat: Any, replay_engine: Any
) -> None:
    engine = replay_engine(digit)
    with make(engine, letter_chat(), max_staleness=2) as collector:
        collector.next_groups(0)
        state = collector.state()
        collector.loop.run(settle(collector))
        collector.loop.run(engine.load_weights(None, 99))
        collector.restore(state)
        spans = [t.segments[0].spans[1] for group in collector.next_groups(1) for t in group.trajectories]
    assert {span.policy_version for span in spans} == {99}


def test_steps_out_of_turn_and_other_tasks_are_refused(letter_chat: Any, replay_engine: Any) -> None:
    class Fewer(Digits):
        def tasks(self, split: str) -> Sequence[Task]:
            return TASKS[1:]

    with make(replay_engine(digit), letter_chat()) as collector:
        with pytest.raises(ScheduleError, match="restore"):
            collector.next_groups(5)
        state = collector.state()
    with make(replay_engine(digit), letter_chat(), Fewer) as other, pytest.raises(ScheduleError, match="other tasks"):
        other.restore(state)
    with make(replay_engine(digit), letter_chat()) as collector, pytest.raises(ScheduleError, match="version"):
        collector.restore({**state, "version": 99})


def test_synchronous_rollouts_begin_only_when_asked_for(letter_chat: Any, replay_engine: Any) -> None:
    engine = replay_engine(digit)
    with make(engine, letter_chat()) as collector:
        collector.next_groups(0)
        collector.loop.run(asyncio.sleep(0))
        assert len(engine.requests) == 12


def test_background_rollouts_are_at_most_max_staleness_ahead(letter_chat: Any, replay_engine: Any) -> None:
    engine = replay_engine(digit)
    with make(engine, letter_chat(), max_staleness=2, num_steps=4) as collector:
        versions = []
        for step in range(4):
            groups = collector.next_groups(step)
            collector.loop.run(settle(collector))
            versions.append({s.policy_version for g in groups for t in g.trajectories for s in t.segments[0].spans[1:]})
            assert len(engine.requests) == 12 * min(step + 3, 4)  # this step, two ahead, none beyond the last
            collector.loop.run(engine.load_weights(None, 8 + step))
    assert versions == [{7}, {7}, {7}, {8}]


@pytest.mark.parametrize(("updates", "oldest"), [(1, 3), (2, 2), (3, 3), (4, 0)])
def test_staleness_counts_versions_not_steps(letter_chat: Any, replay_engine: Any, updates: int, oldest: int) -> None:
    """With `updates` versions a step, no token is more than 3 behind when training on its step begins."""
    engine = replay_engine(digit)
    behind = []
    with make(engine, letter_chat(), max_staleness=3, updates_per_batch=updates, num_steps=8) as collector:
        for step in range(8):
            version = 7 + step * updates
            groups = collector.next_groups(step)
            collector.loop.run(settle(collector))  # what was begun ahead is drawn with these weights
            behind.append(max_staleness(groups, version))
            collector.loop.run(engine.load_weights(None, version + updates))
    assert max(behind) == oldest


async def settle(collector: Collector) -> None:
    while collector._running:
        await asyncio.wait(collector._running)
    await asyncio.sleep(0)


def test_background_and_synchronous_rollouts_give_the_same_groups(letter_chat: Any, replay_engine: Any) -> None:
    found = []
    for staleness in (0, 3):
        with make(replay_engine(digit), letter_chat(), max_staleness=staleness) as collector:
            found.append([outcome(collector.next_groups(step)) for step in range(5)])
    assert found[0] == found[1]


def test_no_more_episodes_run_at_once_than_allowed(letter_chat: Any, replay_engine: Any) -> None:
    engine = replay_engine(digit, max_concurrency=5)
    with make(engine, letter_chat()) as collector:
        collector.next_groups(0)
    assert 1 < engine.most_running <= 5  # how many of the five meet in the engine is the threads' affair


def test_environments_are_used_again_and_closed(letter_chat: Any, replay_engine: Any) -> None:
    class Counted(Digits):
        made = 0
        closed = 0

    with make(replay_engine(digit), letter_chat(), Counted, concurrency=2) as collector:
        for step in range(3):
            collector.next_groups(step)
        assert Counted.made == 3  # one answers for tasks, two play
    assert Counted.closed == 3
    collector.close()
    assert Counted.closed == 3


def test_an_environment_that_failed_is_not_used_again(letter_chat: Any, replay_engine: Any) -> None:
    class Once(Digits):
        def step(self, reply: Any) -> Step:
            if getattr(self, "broken", False):
                raise AssertionError("used again after it failed")
            self.broken = self.task.id in ("t1", "t2")
            return super().step(reply) if not self.broken else 1 / 0  # type: ignore[return-value]

    with make(replay_engine(digit), letter_chat(), Once, concurrency=1, groups_per_step=7) as collector:
        groups = collector.next_groups(0)
    for group in groups:
        failed = [t for t in group.trajectories if t.failed]
        assert len(failed) == (4 if group.task.id in ("t1", "t2") else 0)
        assert all("ZeroDivisionError" in str(t.error) for t in failed)


def test_an_environment_that_cannot_be_made_is_a_failure_of_its_attempt(letter_chat: Any, replay_engine: Any) -> None:
    class Scarce(Digits):
        made = 0

        def __init__(self) -> None:
            super().__init__()
            if type(self).made == 2:
                raise OSError("no more containers")

    with make(replay_engine(digit), letter_chat(), Scarce, concurrency=1) as collector:
        groups = collector.next_groups(0)
        assert collector.metrics["rollout/env_error"] == 1.0
    first = groups[0].trajectories[0]
    assert (first.status, first.num_tokens) == ("env_error", 0)
    assert "no more containers" in str(first.error)
    assert len(groups[0].kept) == 3


def test_the_metrics_count_what_happened(letter_chat: Any, replay_engine: Any) -> None:
    def script(request: GenerateRequest) -> Any:
        kind = request.seed % 5
        return [EngineError("gone"), "nonsense", "final:7", "final:1", "final:" + "9" * 40][kind]

    class Judge(Digits):
        def step(self, reply: Any) -> Step:
            return Step(done=True, reward=-1.0) if reply.malformed else super().step(reply)

    with make(replay_engine(script), letter_chat(), Judge, groups_per_step=6) as collector:
        groups = collector.next_groups(0)
        metrics = collector.metrics
    every = [t for group in groups for t in group.trajectories]
    kept = [t for t in every if not t.failed]
    assert 0 < len(kept) < 24
    assert metrics["rollout/episodes"] == 24.0
    assert metrics["rollout/failed"] == metrics["rollout/engine_error"] == 24 - len(kept)
    assert metrics["rollout/malformed"] == sum(t.turns[0].reply_text == "nonsense" for t in kept)
    assert metrics["rollout/truncated"] == sum(t.turns[0].finish_reason == "length" for t in kept)
    assert metrics["reward/mean"] == pytest.approx(sum(t.reward for t in kept) / len(kept))
    assert metrics["success"] == pytest.approx(sum(t.reward == 7.0 for t in kept) / len(kept))
    assert metrics["rollout/tokens"] == sum(t.num_policy_tokens for t in every)
    assert metrics["rollout/turns"] == 1.0
    signal = [len({t.reward for t in group.kept}) > 1 for group in groups]
    assert metrics["rollout/signal_share"] == pytest.approx(sum(signal) / 6)
    for name in ("rollout/tokens_per_s", "time/rollout_s", "time/rollout_wait_s"):
        assert metrics[name] > 0.0
    assert metrics["rollout/tokens_per_s"] == pytest.approx(metrics["rollout/tokens"] / metrics["time/rollout_s"])


def test_episodes_that_were_ready_took_their_time_all_the_same(letter_chat: Any, replay_engine: Any) -> None:
    """Tokens per second are of the time in which they were drawn, not of the learner's wait for them."""

    class Slow(Digits):
        async def reset(self, task: Task) -> Any:  # type: ignore[override]
            await asyncio.sleep(0.2)
            return super().reset(task)

    with make(replay_engine(digit), letter_chat(), Slow, max_staleness=1) as collector:
        collector.next_groups(0)
        collector.loop.run(settle(collector))
        collector.next_groups(1)
        metrics = collector.metrics
    assert metrics["time/rollout_s"] >= 0.2
    assert metrics["rollout/tokens_per_s"] <= metrics["rollout/tokens"] / 0.2


def test_a_group_with_one_attempt_left_has_no_signal_and_breaks_nothing(letter_chat: Any, replay_engine: Any) -> None:
    def script(request: GenerateRequest) -> Any:
        return "final:7" if request.session_id.endswith(".001/0") else EngineError("gone")

    with make(replay_engine(script), letter_chat()) as collector:
        groups = collector.next_groups(0)
        assert [len(group.kept) for group in groups] == [0, 1, 0]
        assert collector.metrics["rollout/signal_share"] == 0.0
        assert collector.metrics["reward/mean"] == 7.0


def test_a_step_in_which_everything_failed_ends_the_run_with_the_reason(letter_chat: Any, replay_engine: Any) -> None:
    with (
        make(replay_engine(lambda request: EngineError("no memory")), letter_chat()) as collector,
        pytest.raises(RolloutError, match="all 12 episodes failed; the first: engine_error: no memory"),
    ):
        collector.next_groups(0)


def test_a_fault_of_the_program_ends_everything_and_leaves_nothing_behind(letter_chat: Any, replay_engine: Any) -> None:
    engine = replay_engine(lambda request: TypeError("a bug") if request.session_id == "000000.001/2" else "final:1")
    with make(engine, letter_chat()) as collector:
        with pytest.raises(TypeError, match="a bug"):
            collector.next_groups(0)
        assert engine.running == 0
        assert not collector._running
        assert set(engine.ended) >= {request.session_id for request in engine.requests}


def test_evaluation_is_ordered_and_the_same_at_any_time(letter_chat: Any, replay_engine: Any) -> None:
    engine = replay_engine(digit)
    with make(engine, letter_chat(), temperature=1.0, top_p=0.9) as collector:
        tasks = collector.tasks("eval")
        first = collector.collect_eval(tasks, temperature=0.5, seed=9)
        collector.next_groups(0)
        second = collector.collect_eval(tasks, temperature=0.5, seed=9)
        third = collector.collect_eval(tasks, temperature=0.5, seed=10)
        assert collector.collect_eval([], temperature=0.5, seed=9) == []
    assert [t.task for t in first] == TASKS[:3]
    assert [t.segments for t in first] == [t.segments for t in second]
    assert [t.segments for t in first] != [t.segments for t in third]
    sampling = first[0].segments[0].spans[1].sampling
    assert sampling is not None
    assert (sampling.temperature, sampling.top_p) == (0.5, 0.9)


def test_a_reward_function_is_applied(letter_chat: Any, replay_engine: Any) -> None:
    def extra(trajectory: Any, task: Task) -> float:
        return 100.0

    with make(replay_engine(digit), letter_chat(), reward=extra) as collector:
        rewards = [t.reward for group in collector.next_groups(0) for t in group.trajectories]
        assert collector.metrics["reward/extra"] == 100.0
    assert min(rewards) >= 100.0


def test_an_engine_too_small_for_the_rollout_is_refused(letter_chat: Any, replay_engine: Any) -> None:
    with pytest.raises(ValueError, match="max_sequence_tokens"):
        make(replay_engine(digit, max_sequence_tokens=50), letter_chat())


@pytest.mark.parametrize("shared", [False, True])
def test_closing_in_the_middle_of_background_work_ends_every_episode(
    shared: bool, letter_chat: Any, replay_engine: Any
) -> None:
    loop = LoopThread() if shared else None
    engine = replay_engine(digit)
    collector = make(engine, letter_chat(), max_staleness=1, loop=loop)
    engine.hold = collector.loop.run(make_event(True))
    collector.next_groups(0)
    engine.hold.clear()
    collector.close()
    collector.close()
    assert engine.running == 0
    assert set(engine.ended) >= {request.session_id for request in engine.requests}
    assert collector.loop.closed is not shared
    if loop is not None:
        loop.close()
        loop.close()
        with pytest.raises(RuntimeError, match="closed"):
            loop.run(asyncio.sleep(0))


async def make_event(is_set: bool) -> asyncio.Event:
    event = asyncio.Event()
    if is_set:
        event.set()
    return event


def test_ctrl_c_comes_out_and_nothing_is_left_running(letter_chat: Any, replay_engine: Any) -> None:
    class Interrupting(replay_engine):  # type: ignore[misc, valid-type]
        async def generate(self, request: GenerateRequest) -> Any:
            self.requests.append(request)
            self.running += 1
            if self.running == self.max_concurrency:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            try:
                await asyncio.Event().wait()
            finally:
                self.running -= 1

    engine = Interrupting(digit)
    with make(engine, letter_chat()) as collector:
        with pytest.raises(KeyboardInterrupt):
            collector.next_groups(0)
        assert collector.state()["next_step"] == 0
    assert engine.running == 0
    assert sorted(engine.ended) == sorted(request.session_id for request in engine.requests)


def test_an_environment_without_tasks_is_the_users_to_mend(replay_engine, letter_chat):
    with make(replay_engine(digit), letter_chat(), Untold) as collector:
        with pytest.raises(PluginError, match=r"tasks\('train'\) of Untold raised FileNotFoundError: no rows.*py:\d+"):
            collector.next_groups(0)
        with pytest.raises(PluginError, match=r"tasks\('eval'\)"):
            collector.tasks("eval")
    with make(replay_engine(digit), letter_chat(), Nothing) as collector:
        with pytest.raises(ScheduleError, match="no tasks to train on") as caught:
            collector.next_groups(0)
        assert caught.value.exit_code == 2


def test_an_environment_that_lacks_a_method_is_refused_by_its_name():
    factory = env_factory(EnvConfig(id=f"{__name__}:Misspelt"))
    with pytest.raises(PluginError, match="has no tasks, reset, step"):
        factory()
