"""The calculator is safe and right; the quickstart's demonstrations work and never touch held-out tasks."""

from __future__ import annotations

import asyncio
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.chat.base import Reply
from keel.config import EnvConfig
from keel.envs import CalculatorEnv
from keel.envs.arithmetic import evaluate
from keel.envs.load import env_factory
from keel.plugins import PluginError
from keel.types import Message


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 + 5", "17"),
        (" 7-10 ", "-3"),
        ("26 * 54", "1404"),
        ("2 * (3 + 4) ** 2", "98"),
        ("-3 - -3", "0"),
        ("007 + 010", "17"),
        ("10.05 + 1", "11.05"),
        ("7 / 2", "3.5"),
        ("8 / 2", "4"),
        ("7 // 2 % 2", "1"),
        ("1e3", "1000"),
    ],
)
def test_values(expression: str, value: str) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    ("expression", "mentions"),
    [
        ("", "not an arithmetic expression"),
        ("1 +", "not an arithmetic expression"),
        ("1 = 1", "not an arithmetic expression"),
        ("1\x002", "not an arithmetic expression"),
        ("(" * 150, "not an arithmetic expression"),
        ("1" * 201, "longer than 200"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("9 ** 101", "exponent"),
        ("9 ** 9 ** 9", "exponent"),
        ("10 ** 31", "too large"),
        ("1e400", "too large"),
        ("1e30 * 1e30", "too large"),
        ("(-8) ** 0.5", "not a real number"),
        ("__import__('os').getcwd()", "only numbers"),
        ("x + 1", "only numbers"),
        ("'a' * 3", "only numbers"),
        ("True + 1", "only numbers"),
        ("1 << 3", "only numbers"),
        ("1 if 2 else 3", "only numbers"),
        ("[1][0]", "only numbers"),
    ],
)
def test_everything_else_is_refused(expression: str, mentions: str) -> None:
    with pytest.raises(ValueError, match=mentions):
        evaluate(expression)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_no_text_does_anything_but_be_refused(expression: str) -> None:
    try:
        evaluate(expression)
    except ValueError as error:
        assert str(error)  # noqa: PT017


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-999, 999), min_size=1, max_size=6), st.data())
def test_sums_and_products_are_exact(numbers: list[int], data: st.DataObject) -> None:
    value, text = Fraction(numbers[0]), str(numbers[0])
    for number in numbers[1:]:
        sign = data.draw(st.sampled_from("+-"))
        value += number if sign == "+" else -number
        text += f" {sign} {number}"
    assert evaluate(text) == str(value)


def play(env: CalculatorEnv, task: object, *replies: Message) -> list[object]:
    async def episode() -> list[object]:
        await env.reset(task)  # type: ignore[arg-type]
        return [await env.step(Reply((reply,), reply.content)) for reply in replies]

    return asyncio.run(episode())


@pytest.fixture(scope="module")
def env() -> CalculatorEnv:
    return CalculatorEnv(num_tasks=400)


def test_every_task_is_solved_by_its_tool_demonstration_and_rarely_by_a_guess(env: CalculatorEnv) -> None:
    demonstrations = env.demonstrations(300, seed=3, start=0)
    rewards: dict[int, list[float]] = {1: [], 2: []}
    for demonstration in demonstrations:
        steps = play(env, demonstration.task, *(reply[0] for reply in demonstration.replies))
        assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
        rewards[len(steps)].append(steps[-1].reward)
    assert set(rewards[2]) == {1.0}
    assert sum(reward == 1.0 for reward in rewards[1]) < 0.2 * len(rewards[1])
    assert len(rewards[1]) / 300 == pytest.approx(0.4, abs=0.08)


def test_demonstrations_are_a_fixed_sequence_at_train_tasks_only(env: CalculatorEnv) -> None:
    whole = env.demonstrations(60, seed=3, start=0)
    assert [*env.demonstrations(25, seed=3, start=0), *env.demonstrations(35, seed=3, start=25)] == list(whole)
    assert list(env.demonstrations(60, seed=4, start=0)) != list(whole)
    train = {task.id for task in env.tasks("train")}
    assert {demonstration.task.id for demonstration in env.demonstrations(2000, seed=5, start=0)} <= train


@pytest.mark.parametrize(("share", "lengths"), [(0.0, {2}), (1.0, {1})])
def test_the_mixture_is_a_knob(share: float, lengths: set[int]) -> None:
    env = CalculatorEnv(num_tasks=50, guess_share=share)
    assert {len(found.replies) for found in env.demonstrations(40, seed=0, start=0)} == lengths


def test_shapes_of_the_tasks_are_knobs() -> None:
    env = CalculatorEnv(
        tasks_of=("products",), num_tasks=100, product_min_digits=3, product_max_digits=3, instructions="Be quick."
    )
    for task in env.tasks("train"):
        numbers = task.data["question"].split(": ")[1].split(". ")[0].split(" * ")
        assert [len(number) for number in numbers] == [3, 3]
    messages = asyncio.run(env.reset(env.tasks("train")[0]))
    assert messages[0] == Message("developer", "Be quick.")


def test_a_failing_call_is_answered_and_the_episode_goes_on(env: CalculatorEnv) -> None:
    task = env.tasks("train")[0]
    broken = Message("assistant", '{"expression": "1 / 0"}', channel="commentary", recipient="functions.calculator")
    steps = play(env, task, broken, Message("assistant", task.data["answer"], channel="final"))
    assert steps[0].messages[0].content == "Error: calculator failed: division by zero"
    assert (steps[1].done, steps[1].reward) == (True, 1.0)


def test_the_config_names_it_and_its_options_are_checked() -> None:
    make = env_factory(EnvConfig(id="CalculatorEnv", options={"num_tasks": 30}))
    assert isinstance(make(), CalculatorEnv)
    with pytest.raises(PluginError, match="did you mean 'num_tasks'"):
        env_factory(EnvConfig(id="CalculatorEnv", options={"num_task": 30}))
    with pytest.raises(PluginError, match="did you mean 'CalculatorEnv'"):
        env_factory(EnvConfig(id="CalculatorEnvs"))
    with pytest.raises(PluginError, match=r"env\.id is empty"):
        env_factory(EnvConfig())
    with pytest.raises(PluginError, match="must make"):
        env_factory(EnvConfig(id="fractions:Fraction"))()


@pytest.mark.parametrize(
    "options", [{"tasks_of": ("sums",)}, {"tasks_of": ()}, {"guess_share": 1.5}, {"eval_share": -0.1}]
)
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"got|share"):
        CalculatorEnv(**options)  # type: ignore[arg-type]
