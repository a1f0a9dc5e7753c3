"""One episode: reset, then reply by reply until the environment is done, a limit is reached, or the world fails.

Who is to blame is decided here, once. The environment (or a reward) raises or hangs: `env_error`, `env_timeout`. The
engine fails: `engine_error`. The policy runs into a limit: `truncated`, and that counts. A fault of Keel itself (or of
a chat format) is not an outcome of an episode: it is raised and ends the run.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from numbers import Real
from typing import Any, NoReturn

from keel.chat.base import Chat, Prompt, Reply
from keel.engines.base import Engine, EngineError, GenerateRequest, GenerateResult
from keel.envs.base import Env, Step
from keel.envs.calls import call_with_timeout, told
from keel.envs.threads import CallTimeoutError, HangingCallsError
from keel.rewards.base import Reward, RewardError, Score
from keel.rollouts.activity import Activity
from keel.rollouts.tokens import TokenRecord
from keel.types import Message, SamplingSettings, Task, ToolSpec, Trajectory, TrajectoryStatus, Turn


@dataclass(frozen=True, slots=True)
class EpisodeSettings:
    """Limits and draws of an episode: `max_new_tokens` per reply, `max_sequence_tokens` per segment with its prompt."""

    sampling: SamplingSettings
    max_turns: int
    max_new_tokens: int
    max_sequence_tokens: int
    reset_timeout_s: float
    step_timeout_s: float
    return_routes: bool = False
    return_support: bool = False


@dataclass(frozen=True, slots=True)
class Attempt:
    """Which episode: attempt number `attempt` of group `group_id` at `task`. `seed` is the run's; with `step` (the
    policy step), group, attempt and turn it decides every draw."""

    task: Task
    group_id: str
    attempt: int
    seed: int
    step: int

    @property
    def name(self) -> str:
        return f"{self.group_id}/{self.attempt}"

    def draw_seed(self, turn: int) -> int:
        """The engine's seed for reply number `turn`, 63 bits."""
        key = f"{self.seed}/{self.step}/{self.group_id}/{self.attempt}/{turn}"
        return int.from_bytes(blake2b(key.encode(), digest_size=8, person=b"keel-draw").digest(), "big") >> 1


class _EndedError(Exception):
    """The episode is over before its time, for a reason that is not the environment's `done`."""

    def __init__(self, status: TrajectoryStatus, error: str | None = None) -> None:
        super().__init__(status, error)
        self.status: TrajectoryStatus = status
        self.error = error


async def run_episode(
    env: Env,
    attempt: Attempt,
    *,
    engine: Engine,
    chat: Chat,
    settings: EpisodeSettings,
    activity: Activity | None = None,
) -> Trajectory:
    """Run one episode. Whatever the environment or the engine does wrong ends up in the trajectory's status and error,
    with all that was gained until then; the engine's session is ended in any case. `activity` is told what it waits
    for."""
    activity = activity or Activity()
    episode = _Episode(env, attempt, engine, chat, settings, activity)
    try:
        await episode.play()
    except _EndedError as end:
        episode.status, episode.error = end.status, end.error
    finally:
        with contextlib.suppress(EngineError):  # an engine that is gone has no session, and the outcome stands
            await engine.end_session(attempt.name)
        activity.leave(attempt.name)
    trajectory = episode.trajectory()
    if getattr(type(env), "judge", Env.judge) is Env.judge:  # an environment need not be a subclass
        return trajectory
    return await add_reward(trajectory, env.judge, timeout_s=settings.step_timeout_s)


def failed_attempt(attempt: Attempt, status: TrajectoryStatus, error: str) -> Trajectory:
    """An attempt that the world ended before its first message."""
    return Trajectory(attempt.task, attempt.group_id, attempt.attempt, (), (), (), status, error=error)


async def add_reward(trajectory: Trajectory, reward: Reward, *, timeout_s: float) -> Trajectory:
    """The trajectory with what `reward` gives added, or failed with the reward function's error.

    One that failed before is left as it is, without asking.
    """
    if trajectory.failed:
        return trajectory
    name = getattr(getattr(reward, "func", reward), "__name__", type(reward).__name__)
    try:
        value = await _ask(name, reward, trajectory, trajectory.task, timeout_s=timeout_s)
        score = value if isinstance(value, Score) else Score(value, {name: value})
        for part, number in {name: score.reward, **score.parts}.items():
            if not _is_finite(number):
                _refuse(f"{part}() returns a finite number; got {_short(number)}")
    except _EndedError as end:
        return replace(trajectory, status=end.status, error=end.error)
    parts = {**trajectory.reward_parts, **{part: float(number) for part, number in score.parts.items()}}
    total = trajectory.reward + float(score.reward)
    success = trajectory.success if score.success is None else bool(score.success)
    return replace(trajectory, reward=total, reward_parts=parts, success=success)


class _Episode:
    """An episode's state while it runs."""

    def __init__(
        self, env: Env, attempt: Attempt, engine: Engine, chat: Chat, settings: EpisodeSettings, activity: Activity
    ) -> None:
        self.activity = activity
        self.env = env
        self.attempt = attempt
        self.engine = engine
        self.chat = chat
        self.settings = settings
        self.status: TrajectoryStatus = "completed"
        self.error: str | None = None
        self.record = TokenRecord()
        self.first_messages: tuple[Message, ...] = ()
        self.turns: list[Turn] = []
        self.reward = 0.0
        self.reward_parts: Counter[str] = Counter()  # sums of floats
        self.metrics: Counter[str] = Counter()
        self.success: bool | None = None

    async def play(self) -> None:
        """Play to the end; raises _EndedError if that is not the environment's `done`."""
        tools, prompt = await self._begin()
        history = list(self.first_messages)
        while True:
            result = await self._generate(prompt)
            reply, step = await self._answer()
            if result.finish_reason == "length":
                raise _EndedError("truncated")
            if step.done:
                return
            if len(self.turns) >= self.settings.max_turns:
                raise _EndedError("truncated")
            history.extend(reply.messages)
            prompt = self.chat.extend(self.record.token_ids, history, step.messages, tools)
            history.extend(step.messages)

    def _waits_for(self, what: str) -> None:
        self.activity.enter(self.attempt.name, self.attempt.task.id, what)

    async def _begin(self) -> tuple[Sequence[ToolSpec], Prompt]:
        timeout_s = self.settings.reset_timeout_s
        self._waits_for("env.reset")
        messages = await _ask("reset", self.env.reset, self.attempt.task, timeout_s=timeout_s)
        if not isinstance(messages, list | tuple) or not all(isinstance(message, Message) for message in messages):
            raise _EndedError("env_error", f"reset() returns a list of Message; got {_short(messages)}")
        self.first_messages = tuple(messages)
        try:
            tools = self.env.tools()
        except Exception as error:
            raise _EndedError("env_error", f"tools() raised {told(error)}") from error
        prompt = self.chat.start(messages, tools)
        room = self.settings.max_sequence_tokens - len(prompt.token_ids)
        if room <= 0:  # not the policy's doing: it has not said a word
            raise _EndedError(
                "env_error",
                f"the first prompt has {len(prompt.token_ids)} tokens and leaves no room for a reply in "
                f"max_sequence_tokens = {self.settings.max_sequence_tokens}; raise it, or drop such tasks",
            )
        return tools, prompt

    async def _generate(self, prompt: Prompt) -> GenerateResult:
        room = self.settings.max_sequence_tokens - len(prompt.token_ids)
        if room <= 0:
            raise _EndedError("truncated")
        self.record.feed(prompt)
        turn = len(self.turns)
        request = GenerateRequest(
            request_id=f"{self.attempt.name}/{turn}",
            session_id=self.attempt.name,
            token_ids=prompt.token_ids,
            sampling=self.settings.sampling,
            max_new_tokens=min(self.settings.max_new_tokens, room),
            stop_token_ids=self.chat.stop_token_ids,
            seed=self.attempt.draw_seed(turn),
            return_routes=self.settings.return_routes,
            return_support=self.settings.return_support,
        )
        begin = time.perf_counter()
        try:
            self._waits_for("the engine")
            result = await self.engine.generate(request)
        except EngineError as error:
            raise _EndedError("engine_error", f"{error}") from error
        self._record(result, time.perf_counter() - begin, prompt.dropped)
        if result.finish_reason in ("abort", "error"):
            raise _EndedError("engine_error", result.error or f"the engine ended with {result.finish_reason!r}")
        return result

    def _record(self, result: GenerateResult, generate_s: float, dropped: tuple[str, ...]) -> None:
        """Keep what was drawn, and a turn for it (which gets its observation when there is one)."""
        segment, span = self.record.place
        self.record.draw(result)
        reply = self._parse(result)
        self.turns.append(
            Turn(
                reply=reply.messages,
                reply_text=reply.text,
                finish_reason=result.finish_reason,
                segment=segment,
                span=span,
                malformed=reply.malformed,
                generate_s=generate_s,
                dropped=dropped,
            )
        )

    def _parse(self, result: GenerateResult) -> Reply:
        reply = self.chat.parse(result.token_ids)
        if result.finish_reason == "length" and reply.malformed is None:
            return replace(reply, malformed=f"cut off after {len(result.token_ids)} tokens")
        return reply

    async def _answer(self) -> tuple[Reply, Step]:
        """Let the environment answer the last turn, and book what the answer says."""
        turn = self.turns[-1]
        reply = Reply(turn.reply, turn.reply_text, turn.malformed)
        begin = time.perf_counter()
        self._waits_for("env.step")
        try:
            step = _checked(await _ask("step", self.env.step, reply, timeout_s=self.settings.step_timeout_s))
        finally:
            self.turns[-1] = replace(turn, env_s=time.perf_counter() - begin)
        self.turns[-1] = replace(self.turns[-1], observation=tuple(step.messages))
        self.reward += float(step.reward)
        self.reward_parts.update({name: float(value) for name, value in step.reward_parts.items()})
        self.metrics.update({name: float(value) for name, value in step.metrics.items()})
        if step.success is not None:
            self.success = bool(step.success)
        return reply, step

    def trajectory(self) -> Trajectory:
        return Trajectory(
            task=self.attempt.task,
            group_id=self.attempt.group_id,
            attempt=self.attempt.attempt,
            prompt=self.first_messages,
            turns=tuple(self.turns),
            segments=self.record.segments(),
            status=self.status,
            reward=self.reward,
            reward_parts=dict(self.reward_parts),
            success=self.success,
            error=self.error,
            metrics=dict(self.metrics),
        )


async def _ask(what: str, function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
    """Call the environment; its faults end the episode with a status of their own."""
    try:
        return await call_with_timeout(function, *arguments, timeout_s=timeout_s)
    except CallTimeoutError as error:
        raise _EndedError("env_timeout", f"{what}(): {error}") from error
    except HangingCallsError:
        raise
    except RewardError as error:  # tells all there is to tell
        raise _EndedError("env_error", str(error)) from error
    except Exception as error:
        raise _EndedError("env_error", f"{what}() raised {told(error)}") from error


def _checked(step: Any) -> Step:
    """The environment's answer if it is one; a reward that is not a finite number is the environment's fault."""
    if not isinstance(step, Step):
        _refuse(f"step() returns a Step; got {_short(step)}")
    if not all(isinstance(message, Message) for message in step.messages):
        _refuse(f"step() returns messages of type Message; got {_short(step.messages)}")
    numbers = {"reward": step.reward, **step.reward_parts, **step.metrics}
    for name, value in numbers.items():
        if not _is_finite(value):
            _refuse(f"step() returns finite numbers; got {name} = {_short(value)}")
    return step


def _refuse(text: str) -> NoReturn:
    raise _EndedError("env_error", text)


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)  # Real: numpy's numbers, too


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 200 else text[:200] + '...'}"
