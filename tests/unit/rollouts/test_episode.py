"""One episode: what it records token by token, and who is blamed when it goes wrong."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from keel.chat.base import Reply
from keel.engines.base import DrawnSpan, EngineError, GenerateResult
from keel.envs.base import Env, EnvError, Step
from keel.envs.task_env import task_env
from keel.rewards.base import Score
from keel.rollouts.episode import Attempt, EpisodeSettings, add_reward, run_episode
from keel.rollouts.tokens import TokenRecordError
from keel.types import MISSING_ROUTE, Message, SamplingSettings, Task, Trajectory

TASK = Task("t", {"question": "ask"})
ATTEMPT = Attempt(TASK, "g", 3, seed=5, step=2)


def text_of(tokens: Sequence[int]) -> str:
    return "".join(chr(token) for token in tokens)


class Echo(Env):
    """Answers calls with "<text>!", ends with reward 1 on "final:yes"; `act` runs at every step."""

    def __init__(self, act: Callable[[Reply], Any] | None = None) -> None:
        self.act = act

    def reset(self, task: Task) -> Sequence[Message]:
        return [Message("user", str(task.data["question"]))]

    def step(self, reply: Reply) -> Any:
        if self.act is not None and (acted := self.act(reply)) is not None:
            return acted
        if reply.malformed is not None:
            return Step(done=True, reward=-1.0, success=False)
        if reply.calls:
            answers = tuple(Message("tool", f"{call.content}!", name="f") for call in reply.calls)
            return Step(answers, reward=0.25, reward_parts={"call": 0.25}, metrics={"calls": 1.0})
        good = reply.final == "yes"
        return Step(done=True, reward=float(good), success=good, reward_parts={"answer": float(good)})


class AsyncEcho(Echo):
    async def reset(self, task: Task) -> Sequence[Message]:  # type: ignore[override]
        return super().reset(task)

    async def step(self, reply: Reply) -> Any:
        await asyncio.sleep(0)
        return super().step(reply)


def settings(**changes: Any) -> EpisodeSettings:
    values: dict[str, Any] = {
        "sampling": SamplingSettings(0.7),
        "max_turns": 4,
        "max_new_tokens": 40,
        "max_sequence_tokens": 200,
        "reset_timeout_s": 60.0,
        "step_timeout_s": 60.0,
        **changes,
    }
    return EpisodeSettings(**values)


def play(env: Env, engine: Any, chat: Any, **changes: Any) -> Trajectory:
    run = run_episode(env, ATTEMPT, engine=engine, chat=chat, settings=settings(**changes))
    return asyncio.run(run)


def replies(*texts: Any) -> Callable[[Any], Any]:
    left = list(texts)
    return lambda request: left.pop(0)


@pytest.mark.parametrize("env", [Echo(), AsyncEcho()])
def test_an_episode_of_two_turns_token_for_token(env: Env, letter_chat: Any, replay_engine: Any) -> None:
    engine = replay_engine(replies("call:a", "final:yes"))
    done = play(env, engine, letter_chat())
    (segment,) = done.segments
    assert [(span.origin, text_of(span.token_ids)) for span in segment] == [
        ("context", "ask\x01"),
        ("policy", "call:a\x00"),
        ("context", "a!\x01"),
        ("policy", "final:yes\x00"),
    ]
    # Token in, token out: what the engine was given is what the record holds, to the token.
    assert engine.requests[1].token_ids == segment.token_ids[: len(segment) - len("final:yes\x00")]
    drawn = segment.spans[1]
    assert drawn.logprobs == tuple(-0.5 - (4 + i) / 1000 for i in range(7))
    assert (drawn.policy_version, drawn.sampling) == (7, SamplingSettings(0.7))
    assert [(turn.segment, turn.span, turn.finish_reason, turn.reply_text) for turn in done.turns] == [
        (0, 1, "stop", "call:a"),
        (0, 3, "stop", "final:yes"),
    ]
    assert done.turns[0].observation == (Message("tool", "a!", name="f"),)
    assert (done.status, done.reward, done.success, done.error) == ("completed", 1.25, True, None)
    assert done.reward_parts == {"call": 0.25, "answer": 1.0}
    assert done.metrics == {"calls": 1.0}
    assert (done.task, done.group_id, done.attempt, done.prompt) == (TASK, "g", 3, (Message("user", "ask"),))
    assert engine.ended == ["g/3"]
    assert not done.failed


def test_requests_carry_the_limits_and_a_seed_of_their_own(letter_chat: Any, replay_engine: Any) -> None:
    engine = replay_engine(replies("call:a", "call:b", "final:yes"))
    play(Echo(), engine, letter_chat(), max_new_tokens=40, max_sequence_tokens=45)
    first, second, third = engine.requests
    assert [request.max_new_tokens for request in engine.requests] == [40, 45 - 14, 45 - 24]
    assert first.stop_token_ids == (0,)
    assert first.session_id == second.session_id == "g/3"
    assert len({first.request_id, second.request_id, third.request_id}) == 3
    assert len({first.seed, second.seed, third.seed}) == 3
    assert all(0 <= request.seed < 2**63 for request in engine.requests)


def test_the_seed_is_made_of_run_step_group_attempt_and_turn() -> None:
    base = ATTEMPT.draw_seed(0)
    others = [
        Attempt(TASK, "h", 3, 5, 2).draw_seed(0),
        Attempt(TASK, "g", 4, 5, 2).draw_seed(0),
        Attempt(TASK, "g", 3, 6, 2).draw_seed(0),
        Attempt(TASK, "g", 3, 5, 3).draw_seed(0),
        ATTEMPT.draw_seed(1),
    ]
    assert len({base, *others}) == 6
    assert Attempt(TASK, "g", 3, 5, 2).draw_seed(0) == base


def test_routes_of_the_last_drawn_token_arrive_with_the_next_turn(letter_chat: Any, replay_engine: Any) -> None:
    engine = replay_engine(replies("call:a", "final:yes"), routes=True)
    (segment,) = play(Echo(), engine, letter_chat(), return_routes=True).segments
    found = [
        int.from_bytes(span.routed_experts.data[2 * i : 2 * i + 2], sys.byteorder)
        for span in segment
        if span.routed_experts is not None
        for i in range(span.routed_experts.num_tokens)
    ]
    # Request 0 feeds positions 0 to 9; its last token, position 10, is fed by request 1 (choices from 1000 on).
    assert found == [*range(10), *(1000 + position for position in range(10, 23)), MISSING_ROUTE]
    assert len(found) == len(segment)


def test_routes_that_were_given_first_stay(letter_chat: Any, replay_engine: Any) -> None:
    engine = replay_engine(replies("call:a", "final:yes"), routes=True)
    engine.cached = Forgetful()  # the engine lost the session's prefix, and feeds everything again in turn 2
    (segment,) = play(Echo(), engine, letter_chat(), return_routes=True).segments
    values = b"".join(span.routed_experts.data for span in segment)
    assert [int.from_bytes(values[i : i + 2], sys.byteorder) for i in (0, 18, 20)] == [0, 9, 1010]


class Forgetful(dict[str, int]):
    def get(self, key: str, default: Any = None) -> Any:
        return default


def test_a_prompt_that_does_not_extend_starts_a_new_segment(letter_chat: Any, replay_engine: Any) -> None:
    engine = replay_engine(replies("call:a", "final:yes"))
    done = play(Echo(), engine, letter_chat(forgetful=True))
    assert [text_of(segment.token_ids) for segment in done.segments] == [
        "ask\x01call:a\x00",
        "ask\x01a!\x01final:yes\x00",
    ]
    assert [(turn.segment, turn.span) for turn in done.turns] == [(0, 1), (1, 1)]
    assert [turn.dropped for turn in done.turns] == [(), ("all but the first message",)]


def test_an_engine_that_cannot_end_a_session_changes_no_outcome(
    letter_chat: Any, replay_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = replay_engine(replies("final:yes"))

    async def refuse(session_id: str) -> None:
        raise EngineError("the engine is gone")

    monkeypatch.setattr(engine, "end_session", refuse)
    done = play(Echo(), engine, letter_chat())
    assert (done.status, done.reward, done.error) == ("completed", 1.0, None)
    monkeypatch.setattr(engine, "script", replies(ValueError("a fault of the program")))
    with pytest.raises(ValueError, match="a fault of the program"):
        play(Echo(), engine, letter_chat())


def test_a_chat_that_lies_about_extending_is_a_fault_not_an_outcome(letter_chat: Any, replay_engine: Any) -> None:
    chat = letter_chat()
    honest = chat.extend
    chat.extend = lambda tokens, *rest: honest([65, *tokens[1:]], *rest)
    with pytest.raises(TokenRecordError, match="extends"):
        play(Echo(), replay_engine(replies("call:a", "final:yes")), chat)


def test_weights_that_change_on_the_way_give_spans_of_both_versions(letter_chat: Any, replay_engine: Any) -> None:
    spans = (DrawnSpan(tuple(map(ord, "final:")), (-1.0,) * 6, 7), DrawnSpan((*map(ord, "yes"), 0), (-2.0,) * 4, 8))
    result = GenerateResult("g/3/0", spans, "stop", SamplingSettings(0.7))
    done = play(Echo(), replay_engine(replies(result)), letter_chat())
    assert [span.policy_version for span in done.segments[0]] == [None, 7, 8]
    assert done.turns[0].span == 1
    assert done.reward == 1.0


def test_a_malformed_reply_is_an_outcome_that_counts(letter_chat: Any, replay_engine: Any) -> None:
    done = play(Echo(), replay_engine(replies("nonsense")), letter_chat())
    assert (done.status, done.reward, done.failed) == ("completed", -1.0, False)
    assert done.turns[0].malformed == "no kind in 'nonsense'"


@pytest.mark.parametrize("limit", [{"max_turns": 2}, {"max_sequence_tokens": 24}])
def test_limits_truncate_and_what_was_earned_counts(
    letter_chat: Any, replay_engine: Any, limit: dict[str, int]
) -> None:
    done = play(Echo(), replay_engine(replies(*["call:a"] * 9)), letter_chat(), **limit)
    assert (done.status, done.failed, len(done.turns)) == ("truncated", False, 2)
    assert done.reward == 0.5
    assert done.segments[0].spans[-1].origin == "policy"
    assert len(done.segments[0]) <= 24


def test_a_reply_cut_off_at_its_limit_truncates_and_is_judged_as_malformed(
    letter_chat: Any, replay_engine: Any
) -> None:
    seen: list[Reply] = []
    done = play(Echo(seen.append), replay_engine(replies("final:yes")), letter_chat(), max_new_tokens=5)
    assert (done.status, done.reward, done.turns[0].finish_reason) == ("truncated", -1.0, "length")
    assert seen[0].malformed is not None
    assert done.num_policy_tokens == 5


def test_a_cut_reply_that_happens_to_parse_is_malformed_too(letter_chat: Any, replay_engine: Any) -> None:
    span = DrawnSpan((*map(ord, "final:yes"), 0), (-1.0,) * 10, 7)
    result = GenerateResult("g/3/0", (span,), "length", SamplingSettings())
    done = play(Echo(), replay_engine(replies(result)), letter_chat())
    assert (done.status, done.reward) == ("truncated", -1.0)


def boom(reply: Reply) -> None:
    raise KeyError("the sandbox is gone")


def leave(reply: Reply) -> None:
    sys.exit(3)


def lost(reply: Reply) -> None:
    raise EnvError("connection lost")


@pytest.mark.parametrize(
    ("act", "mentions"),
    [
        (boom, "step() raised KeyError: 'the sandbox is gone' (test_episode.py:"),
        (leave, "SystemExit: 3"),
        (lost, "EnvError: connection lost"),
        (lambda reply: 1.0, "step() returns a Step; got float 1.0"),
        (lambda reply: Step(reward=float("nan")), "got reward = float nan"),
        (lambda reply: Step(reward=None), "got reward = NoneType"),
        (lambda reply: Step(metrics={"x": float("inf")}), "got x = float inf"),
        (lambda reply: Step(messages=("hello",)), "messages of type Message"),
    ],
)
@pytest.mark.parametrize("kind", [Echo, AsyncEcho])
def test_the_environments_failure_is_never_a_reward(
    kind: type[Echo], act: Any, mentions: str, letter_chat: Any, replay_engine: Any
) -> None:
    engine = replay_engine(replies("call:a", "final:yes"))
    done = play(kind(act), engine, letter_chat())
    assert (done.status, done.failed) == ("env_error", True)
    assert mentions in str(done.error)
    assert text_of(done.segments[0].token_ids) == "ask\x01call:a\x00"  # what was gained is kept
    assert len(done.turns) == 1
    assert engine.ended == ["g/3"]


class Hanging(Echo):
    def __init__(self, event: threading.Event) -> None:
        super().__init__(lambda reply: event.wait())


def test_numbers_of_numpy_are_numbers(letter_chat: Any, replay_engine: Any) -> None:
    def act(reply: Reply) -> Step:
        return Step(done=True, reward=np.float32(0.5), reward_parts={"a": np.float32(0.5)}, metrics={"b": np.int64(2)})

    done = play(Echo(act), replay_engine(replies("final:yes")), letter_chat())
    assert json.loads(json.dumps([done.reward, dict(done.reward_parts), dict(done.metrics)])) == [
        0.5,
        {"a": 0.5},
        {"b": 2.0},
    ]


class HangingAsync(Echo):
    def __init__(self, event: threading.Event) -> None:
        super().__init__()

    async def step(self, reply: Reply) -> Any:
        await asyncio.Event().wait()


@pytest.mark.parametrize("kind", [Hanging, HangingAsync])
def test_an_environment_that_hangs_is_timed_out(kind: Any, letter_chat: Any, replay_engine: Any) -> None:
    release = threading.Event()
    engine = replay_engine(replies("call:a"))
    done = play(kind(release), engine, letter_chat(), step_timeout_s=0.05)
    release.set()
    assert (done.status, done.error) == ("env_timeout", "step(): no answer within 0.05 s")
    assert text_of(done.segments[0].token_ids) == "ask\x01call:a\x00"
    assert engine.ended == ["g/3"]


@pytest.mark.parametrize(
    ("first", "mentions"),
    [
        ("not a list", "reset() returns a list of Message; got str"),
        ([Message("user", "x" * 300)], "the first prompt has 301 tokens"),
        (RuntimeError("no port"), "reset() raised RuntimeError: no port"),
    ],
)
def test_an_episode_that_never_began_is_the_environments_failure(
    first: Any, mentions: str, letter_chat: Any, replay_engine: Any
) -> None:
    class Broken(Echo):
        def reset(self, task: Task) -> Any:
            if isinstance(first, Exception):
                raise first
            return first

    done = play(Broken(), replay_engine(replies()), letter_chat())
    assert (done.status, done.turns, done.num_tokens) == ("env_error", (), 0)
    assert mentions in str(done.error)


def test_an_engine_that_fails_is_the_engines_failure(letter_chat: Any, replay_engine: Any) -> None:
    done = play(Echo(), replay_engine(replies("call:a", EngineError("out of memory"))), letter_chat())
    assert (done.status, done.error, len(done.turns)) == ("engine_error", "out of memory", 1)
    assert text_of(done.segments[0].token_ids) == "ask\x01call:a\x00a!\x01"


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_reply_the_engine_aborted_never_reaches_the_environment(
    reason: Any, letter_chat: Any, replay_engine: Any
) -> None:
    seen: list[Reply] = []
    span = DrawnSpan(tuple(map(ord, "final")), (-1.0,) * 5, 7)
    result = GenerateResult("g/3/0", (span,), reason, SamplingSettings(), error="evicted")
    done = play(Echo(seen.append), replay_engine(replies(result)), letter_chat())
    assert (done.status, done.error, seen) == ("engine_error", "evicted", [])
    assert done.num_policy_tokens == 5


def test_a_bug_in_the_engine_or_the_chat_is_raised(letter_chat: Any, replay_engine: Any) -> None:
    with pytest.raises(TypeError, match="bug"):
        play(Echo(), replay_engine(replies(TypeError("bug"))), letter_chat())


def finished(reward: float = 1.0, **changes: Any) -> Trajectory:
    return Trajectory(TASK, "g", 0, (), (), (), **{"status": "completed", "reward": reward, **changes})


def half(trajectory: Trajectory, task: Task) -> float:
    return 0.5


async def tenth(trajectory: Trajectory, task: Task) -> float:
    return 0.1


@pytest.mark.parametrize(("reward", "value"), [(half, 0.5), (tenth, 0.1)])
def test_a_reward_function_is_added_by_name(reward: Any, value: float) -> None:
    done = asyncio.run(add_reward(finished(reward_parts={"answer": 1.0}), reward, timeout_s=60.0))
    assert done.reward == 1.0 + value
    assert done.reward_parts == {"answer": 1.0, reward.__name__: value}


@pytest.mark.parametrize("outcome", [ValueError("no judge"), float("nan"), None, "1"])
def test_a_reward_function_that_fails_makes_a_failure_not_a_zero(outcome: Any) -> None:
    def judge(trajectory: Trajectory, task: Task) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    done = asyncio.run(add_reward(finished(), judge, timeout_s=60.0))
    assert (done.status, done.failed) == ("env_error", True)
    assert "judge()" in str(done.error)


def test_a_failed_trajectory_is_not_judged() -> None:
    def judge(trajectory: Trajectory, task: Task) -> float:
        raise AssertionError("asked")

    spoiled = finished(status="engine_error", error="gone")
    assert asyncio.run(add_reward(spoiled, judge, timeout_s=60.0)) is spoiled


class Judged(Echo):
    """An environment that judges the finished episode as a whole."""

    def __init__(self, verdict: Callable[[Trajectory], Any]) -> None:
        super().__init__()
        self.verdict = verdict

    def judge(self, trajectory: Trajectory, task: Task) -> Any:
        assert task is trajectory.task
        return self.verdict(trajectory)


def test_a_judge_adds_to_what_the_steps_gave(letter_chat: Any, replay_engine: Any) -> None:
    env = Judged(lambda done: Score(float(len(done.turns)), {"turns": float(len(done.turns))}, success=False))
    done = play(env, replay_engine(replies("call:a", "final:yes")), letter_chat())
    assert (done.reward, done.success, done.status) == (1.25 + 2.0, False, "completed")
    assert done.reward_parts == {"call": 0.25, "answer": 1.0, "turns": 2.0}


def test_a_truncated_episode_is_judged_and_a_failed_one_is_not(letter_chat: Any, replay_engine: Any) -> None:
    def verdict(done: Trajectory) -> Score:
        seen.append(done.status)
        return Score(0.5)

    seen: list[str] = []
    cut = play(Judged(verdict), replay_engine(replies("call:a", "call:b")), letter_chat(), max_turns=2)
    assert (cut.status, cut.reward, cut.success) == ("truncated", 2 * 0.25 + 0.5, None)
    gone = play(Judged(verdict), replay_engine(replies(EngineError("gone"))), letter_chat())
    assert (gone.status, gone.reward) == ("engine_error", 0.0)
    assert seen == ["truncated"]


@pytest.mark.parametrize(
    ("verdict", "status", "said"),
    [
        (lambda done: Score(float("nan")), "env_error", "judge() returns a finite number; got float nan"),
        (lambda done: Score(1.0, {"part": float("inf")}), "env_error", "part() returns a finite number"),
        (lambda done: None, "env_error", "judge() returns a finite number; got NoneType"),
        (lambda done: 1 / 0, "env_error", "judge() raised ZeroDivisionError"),
        (lambda done: threading.Event().wait(), "env_timeout", "judge(): no answer within 0.05 s"),
    ],
)
def test_a_judge_that_fails_makes_a_failure_not_a_zero(
    letter_chat: Any, replay_engine: Any, verdict: Any, status: str, said: str
) -> None:
    done = play(Judged(verdict), replay_engine(replies("final:yes")), letter_chat(), step_timeout_s=0.05)
    assert (done.status, done.failed) == (status, True)
    assert said in str(done.error)


@pytest.mark.parametrize("hang", [lambda *_: threading.Event().wait(), lambda *_: asyncio.Event().wait()])
def test_a_reward_of_a_task_env_that_hangs_is_left_behind(letter_chat: Any, replay_engine: Any, hang: Any) -> None:
    env = task_env([{"question": "ask"}], reward=hang, eval_share=0.0)()
    done = play(env, replay_engine(replies("final:yes")), letter_chat(), step_timeout_s=0.05)
    assert done.status == "env_timeout"


def test_a_reward_that_cannot_be_computed_is_told_once_and_whole(letter_chat: Any, replay_engine: Any) -> None:
    def late(trajectory: Trajectory, task: Task) -> float:
        raise ConnectionError("no judge")

    env = task_env([{"question": "ask"}], reward=["exact_match", late], answer="question", eval_share=0.0)()
    done = play(env, replay_engine(replies("final:ask")), letter_chat())
    assert done.status == "env_error"
    assert str(done.error).startswith("reward late raised ConnectionError: no judge (test_episode.py:")
