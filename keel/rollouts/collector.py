"""Schedules rollouts: tasks of a step x attempts, as many at once as the engine takes, in an order that never varies.

With `max_staleness` 0 a step's episodes run while the learner waits, on the newest weights. With s > 0 episodes of
later steps run in the background while the learner learns, as many steps ahead as leave a token at most s versions old
when training on it begins (a step of u updates makes u versions). Either way the same code runs on one event loop in
its own thread; only how early a step is begun differs.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from keel.chat.base import Chat
from keel.config import EnvConfig, RolloutConfig
from keel.engines.base import Engine
from keel.envs.base import Split
from keel.envs.calls import told
from keel.envs.load import EnvFactory, tasks_of
from keel.rewards.base import Reward
from keel.rollouts.activity import Activity
from keel.rollouts.episode import Attempt, EpisodeSettings, add_reward, failed_attempt, run_episode
from keel.rollouts.loop_thread import LoopThread
from keel.rollouts.metrics import rollout_metrics
from keel.rollouts.pool import EnvPool
from keel.rollouts.schedule import ScheduleError, TaskSchedule
from keel.types import Fault, Group, SamplingSettings, Task, Trajectory

STATE_VERSION = 1
_EVAL_STEP = -1  # in place of the policy step, so that an evaluation draws the same numbers whenever it runs


class RolloutError(Fault, RuntimeError):
    """Rollouts cannot go on: every episode of a step failed. The text has the first failure's reason, `trajectories`
    are the episodes."""

    def __init__(self, text: str, trajectories: Sequence[Trajectory] = ()) -> None:
        super().__init__(text)
        self.trajectories = tuple(trajectories)


@dataclass(frozen=True, slots=True)
class _Produced:
    groups: list[Group]
    seconds: float


class Collector:
    """Groups for the learner, trajectories for evaluation. Close it, or use it as a context manager."""

    def __init__(
        self,
        engine: Engine,
        env_factory: EnvFactory,
        chat: Chat,
        rollout: RolloutConfig,
        env: EnvConfig,
        *,
        seed: int,
        num_steps: int | None = None,
        updates_per_batch: int = 1,
        reward: Reward | None = None,
        loop: LoopThread | None = None,
    ) -> None:
        """`num_steps` is where background rollouts stop looking ahead, `updates_per_batch` how many versions a step
        makes of the policy; `loop` is the engine's, if it has one already.

        Raises ValueError if the engine cannot do what `rollout` asks for.
        """
        self._engine = engine
        self._chat = chat
        self._config = rollout
        self._env_config = env
        self._seed = seed
        self._num_steps = num_steps
        self._steps_ahead = rollout.max_staleness // updates_per_batch
        self._reward = reward
        self._owns_loop = loop is None
        self._settings = self._make_settings()
        self.activity = Activity()
        """What the episodes that run are doing."""
        self._env = env_factory()  # answers questions about tasks; plays no episode
        self._pool = EnvPool(env_factory)
        self._closed = False
        self._limit = asyncio.Semaphore(rollout.concurrency or engine.capabilities().max_concurrency)
        self._schedule: TaskSchedule | None = None
        self._running: set[asyncio.Task[Trajectory]] = set()
        self._ahead: dict[int, concurrent.futures.Future[_Produced]] = {}
        self._metrics: dict[str, float] = {}
        self.loop = loop or LoopThread()

    def tasks(self, split: Split) -> Sequence[Task]:
        """All tasks of a split, as the environment orders them."""
        return tasks_of(self._env, split)

    def next_groups(self, step: int) -> list[Group]:
        """The groups of `step`, which must follow the last one: `groups_per_step`, in the order of their tasks.

        Failed attempts are in their groups, with their status; `Group.kept` leaves them out. Raises RolloutError if
        every attempt failed, ScheduleError for a step out of turn, and whatever is not an outcome of an episode.
        """
        begin = time.perf_counter()
        schedule = self._train_schedule()
        schedule.require(step)
        future = self._ahead.pop(step, None) or self._begin(step)
        self._look_ahead(step)
        produced = self.loop.wait(future)
        schedule.advance()  # not earlier: a step that was interrupted is still the next one
        self._metrics = rollout_metrics(produced.groups, produced.seconds)
        self._metrics["time/rollout_wait_s"] = time.perf_counter() - begin
        return produced.groups

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics of the step that `next_groups` returned last: `rollout_metrics`, and the wait for it."""
        return self._metrics

    def collect_eval(
        self, tasks: Sequence[Task], *, temperature: float, seed: int, attempts: int = 1
    ) -> list[Trajectory]:
        """`attempts` at each task, one task after the other.

        The same seed draws the same numbers, at any time of a run. Raises RolloutError if every attempt failed.
        """
        sampling = replace(self._settings.sampling, temperature=temperature)
        settings = replace(self._settings, sampling=sampling, return_support=False)  # nobody learns from these
        planned = [
            Attempt(task, f"eval{index:05d}", attempt, seed, _EVAL_STEP)
            for index, task in enumerate(tasks)
            for attempt in range(attempts)
        ]
        return self.loop.run(self._run(planned, settings)) if planned else []

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint: which step comes next and where in the tasks it begins."""
        return {"version": STATE_VERSION, **self._train_schedule().state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on as if the steps before `state` had just been collected. Raises ScheduleError if the tasks differ."""
        if state.get("version") != STATE_VERSION:
            raise ScheduleError(f"collector state of version {state.get('version')}; this Keel reads {STATE_VERSION}")
        self._drop_ahead()
        self._train_schedule().restore(state)

    def close(self) -> None:
        """Cancel what runs, close all environments, and the event loop if it is the collector's own."""
        if self._closed or self.loop.closed:
            return
        self._closed = True
        try:
            self._drop_ahead()
            self._pool.give_back(self._env)
            self.loop.run(self._pool.close())
        finally:
            if self._owns_loop:
                self.loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_settings(self) -> EpisodeSettings:
        config, can = self._config, self._engine.capabilities()
        if config.max_sequence_tokens > can.max_sequence_tokens:
            raise ValueError(
                f"rollout.max_sequence_tokens is {config.max_sequence_tokens}, but engine {can.name!r} holds "
                f"{can.max_sequence_tokens} tokens per sequence: lower the one or raise engine.max_sequence_tokens"
            )
        sampling = SamplingSettings(config.temperature, config.top_p, config.top_k)
        return EpisodeSettings(
            sampling=sampling,
            max_turns=config.max_turns,
            max_new_tokens=config.max_new_tokens,
            max_sequence_tokens=config.max_sequence_tokens,
            reset_timeout_s=self._env_config.reset_timeout_s,
            step_timeout_s=self._env_config.step_timeout_s,
            return_routes=can.returns_routes,
            return_support=can.returns_support and sampling.is_cut,
        )

    def _train_schedule(self) -> TaskSchedule:
        """Made when first needed: a collector that only evaluates needs no training tasks."""
        if self._schedule is None:
            per_step = self._config.groups_per_step
            self._schedule = TaskSchedule(self.tasks("train"), per_step=per_step, seed=self._seed)
        return self._schedule

    def _look_ahead(self, step: int) -> None:
        end = step + 1 + self._steps_ahead
        if self._num_steps is not None:
            end = min(end, self._num_steps)
        for later in range(step + 1, end):
            if later not in self._ahead:
                self._ahead[later] = self._begin(later)

    def _begin(self, step: int) -> concurrent.futures.Future[_Produced]:
        return self.loop.begin(self._produce(step, self._train_schedule().peek(step)))

    def _drop_ahead(self) -> None:
        """Give up what was begun in the background, and wait until nothing of it runs any more."""
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
        self.loop.run(self._settle())

    async def _settle(self) -> None:
        await asyncio.sleep(0)  # lets the cancellations above arrive
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    async def _produce(self, step: int, tasks: Sequence[Task]) -> _Produced:
        begin = time.perf_counter()
        size = self._config.group_size
        names = [f"{step:06d}.{index:03d}" for index in range(len(tasks))]
        attempts = [
            Attempt(task, name, attempt, self._seed, step)
            for name, task in zip(names, tasks, strict=True)
            for attempt in range(size)
        ]
        done = await self._run(attempts, self._settings)
        groups = [
            Group(name, task, tuple(done[index * size : (index + 1) * size]))
            for index, (name, task) in enumerate(zip(names, tasks, strict=True))
        ]
        return _Produced(groups, time.perf_counter() - begin)

    async def _run(self, attempts: Sequence[Attempt], settings: EpisodeSettings) -> list[Trajectory]:
        """All attempts, in order. The first fault that is no outcome of an episode cancels the others."""
        tasks = [asyncio.ensure_future(self._attempt(attempt, settings)) for attempt in attempts]
        self._running.update(tasks)
        try:
            done = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        finally:
            self._running.difference_update(tasks)
        if all(trajectory.failed for trajectory in done):
            text = f"all {len(done)} episodes failed; the first: {done[0].status}: {done[0].error}"
            raise RolloutError(text, done)
        return done

    async def _attempt(self, attempt: Attempt, settings: EpisodeSettings) -> Trajectory:
        async with self._limit:
            try:
                env = self._pool.take()
            except Exception as error:  # noqa: BLE001 (user code: the constructor of an environment)
                return failed_attempt(attempt, "env_error", f"no environment could be made: {told(error)}")
            trajectory = await run_episode(
                env, attempt, engine=self._engine, chat=self._chat, settings=settings, activity=self.activity
            )
            if trajectory.status in ("env_error", "env_timeout"):
                await self._pool.discard(env, hanging=trajectory.status == "env_timeout")
            else:
                self._pool.give_back(env)
            if self._reward is None:
                return trajectory
            return await add_reward(trajectory, self._reward, timeout_s=settings.step_timeout_s)
