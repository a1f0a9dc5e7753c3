"""Demonstrations are played against the real environment and written by the real chat format."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from keel.chat import make_chat
from keel.config import ChatConfig
from keel.envs import CalculatorEnv
from keel.envs.base import Demonstration, Env, Step
from keel.models.tiny import build_tiny_tokenizer
from keel.rollouts.demonstrate import DemonstrationError, DemonstrationSource
from keel.types import Group, Message, Task, Trajectory

make_env = functools.partial(CalculatorEnv, num_tasks=200, guess_share=0.5)


@pytest.fixture(scope="module", params=["harmony", "chatml"])
def chat(request: pytest.FixtureRequest) -> Any:
    texts = [task.data["question"] for task in make_env().tasks("train")]
    return make_chat(ChatConfig(), build_tiny_tokenizer(texts, style=request.param))


def source(chat: Any, **options: Any) -> DemonstrationSource:
    return DemonstrationSource(make_env, chat, **{"per_step": 20, "seed": 1, **options})


def trajectories(groups: list[Group]) -> list[Trajectory]:
    return [trajectory for group in groups for trajectory in group.trajectories]


def test_what_is_demonstrated_is_what_the_chat_reads_and_the_environment_rewards(chat: Any) -> None:
    found = trajectories(source(chat).next_groups(0))
    assert {len(trajectory.turns) for trajectory in found} == {1, 2}
    for trajectory in found:
        (segment,) = trajectory.segments
        assert [span.origin for span in segment] == ["context", "demonstration"] * len(trajectory.turns)
        for turn in trajectory.turns:
            reply = chat.parse(segment.spans[turn.span].token_ids)
            assert (reply.malformed, reply.messages) == (None, turn.reply)
        if len(trajectory.turns) == 2:
            assert trajectory.turns[0].observation[0].content == trajectory.task.data["answer"]
            assert (trajectory.reward, trajectory.success) == (1.0, True)
        assert trajectory.num_policy_tokens == 0  # nobody drew these tokens: they have no log-probs


def test_the_tokens_are_those_an_episode_of_the_same_replies_would_have(chat: Any) -> None:
    env = make_env(guess_share=0.0)
    trajectory = trajectories(DemonstrationSource(lambda: env, chat, per_step=1, seed=1).next_groups(0))[0]
    spans = trajectory.segments[0].spans
    prompt = chat.start(trajectory.prompt, env.tools())
    assert spans[0].token_ids == prompt.token_ids
    first = trajectory.turns[0]
    seen = (*prompt.token_ids, *spans[1].token_ids)
    following = chat.extend(seen, [*trajectory.prompt, *first.reply], first.observation, env.tools())
    assert (*seen, *spans[2].token_ids) == following.token_ids


def test_the_sequence_goes_on_after_a_restore(chat: Any) -> None:
    first = source(chat)
    first.next_groups(0)
    state = json.loads(json.dumps(first.state()))
    resumed = source(chat)
    resumed.restore(state)
    assert resumed.next_groups(1) == first.next_groups(1)
    assert resumed.next_groups(2) != first.next_groups(1)


FINAL = Message("assistant", "1", channel="final")
CALL = Message("assistant", '{"expression": "1"}', recipient="functions.calculator", channel="commentary")


@pytest.mark.parametrize(
    ("replies", "mentions"),
    [
        (((FINAL,), (FINAL,)), "reply 0 ends the episode early"),
        (((CALL,),), "reply 0 does not end the episode"),
        (((FINAL,),), "malformed"),
    ],
)
def test_a_demonstration_that_does_not_work_is_refused(replies: Any, mentions: str, letter_chat: Any) -> None:
    task = make_env().tasks("train")[0]

    def one(count: int, *, seed: int, start: int) -> list[Demonstration]:
        return [Demonstration(task, replies)] * count

    class Plain(Env):
        def reset(self, task: Task) -> list[Message]:
            return [Message("user", "?")]

        def step(self, reply: Any) -> Step:
            return Step(done=not reply.calls)

    class Deaf(letter_chat):  # type: ignore[misc, valid-type]
        def parse(self, token_ids: Any) -> Any:
            return super().parse(token_ids[:-1])

    chat = Deaf() if mentions == "malformed" else letter_chat()
    demonstrations = DemonstrationSource(Plain, chat, per_step=1, seed=0, demonstrations=one)
    with pytest.raises(DemonstrationError, match=mentions):
        demonstrations.next_groups(0)


def test_too_few_demonstrations_are_refused(letter_chat: Any) -> None:
    demonstrations = DemonstrationSource(
        make_env, letter_chat(), per_step=3, seed=0, demonstrations=lambda count, *, seed, start: []
    )
    with pytest.raises(DemonstrationError, match="asked for 3 demonstrations, got 0"):
        demonstrations.next_groups(0)


def test_its_metrics_are_of_its_last_step_and_its_environment_is_closed_once(chat: Any) -> None:
    closed = []

    class Closing(CalculatorEnv):
        def close(self) -> None:
            closed.append(self)

    made = DemonstrationSource(lambda: Closing(num_tasks=300), chat, per_step=3, seed=1)
    groups = made.next_groups(0)
    assert made.metrics["rollout/episodes"] == len(groups) == 3
    assert made.metrics["time/rollout_s"] == made.metrics["time/rollout_wait_s"] > 0
    made.close()
    made.close()
    assert len(closed) == 1
