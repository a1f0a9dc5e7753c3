"""Tasks of reasoning-gym: its own entries and scores, split by content, the same every time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from keel.chat.base import Reply
from keel.envs.base import EnvError
from keel.envs.reasoning_gym import ReasoningGymEnv, ReasoningGymTasks
from keel.types import Message, Task

MIXTURE = {"chain_sum": {"max_terms": 3, "max_digits": 2}, "products": {"max_digits": 2}}


def tasks_of(
    seed: int = 0, size: int = 300, eval_share: float = 0.25, **datasets: dict[str, object]
) -> ReasoningGymTasks:
    return ReasoningGymTasks(datasets or MIXTURE, size=size, seed=seed, eval_share=eval_share)


def answer(text: str) -> Reply:
    return Reply((Message("assistant", text, channel="final"),), text)


def test_questions_answers_and_scores_are_the_librarys() -> None:
    source = tasks_of(chain_sum={"seed": 11, "max_digits": 2})
    dataset = reasoning_gym.create_dataset("chain_sum", seed=11, size=300, max_digits=2)
    entries = {entry["question"]: entry for entry in reversed(list(dataset))}  # of equal questions the first
    tasks = source.tasks("train") + source.tasks("eval")
    assert {task.data["question"] for task in tasks} == set(entries)
    for task in tasks[:50]:
        entry = entries[task.data["question"]]
        assert source.entry(task) == entry
        for text in (entry["answer"], f"{entry['answer']}.0", f"{entry['answer']}5", "no", ""):
            assert source.score(task, text) == dataset.score_answer(text, entry)


def test_equal_questions_are_one_task_and_splits_share_none() -> None:
    source = tasks_of(chain_sum={"max_terms": 2, "max_digits": 1})  # at most 200 different questions in 300
    train, held_out = source.tasks("train"), source.tasks("eval")
    questions = [task.data["question"] for task in train + held_out]
    assert len(questions) == len(set(questions)) < 200
    assert not {task.id for task in train} & {task.id for task in held_out}
    assert held_out


def test_no_seed_size_or_mixture_moves_a_question_to_the_other_split() -> None:
    def split(source: ReasoningGymTasks) -> dict[str, str]:
        return {task.id: name for name in ("train", "eval") for task in source.tasks(name)}

    first = split(tasks_of(chain_sum={"max_terms": 2, "max_digits": 1}))
    for other in (
        tasks_of(seed=1, chain_sum={"max_terms": 2, "max_digits": 1}),
        tasks_of(size=150, products={}, chain_sum={"max_terms": 2, "max_digits": 1}),
    ):
        shared = first.keys() & split(other).keys()
        assert len(shared) > 50
        assert all(first[key] == split(other)[key] for key in shared)


def test_the_share_of_held_out_tasks() -> None:
    source = tasks_of(size=2000, eval_share=0.25)
    num_train, num_eval = len(source.tasks("train")), len(source.tasks("eval"))
    assert num_eval / (num_train + num_eval) == pytest.approx(0.25, abs=0.03)
    assert tasks_of(eval_share=0.0).tasks("eval") == ()
    assert tasks_of(eval_share=1.0).tasks("train") == ()


def test_a_mixture_is_mixed() -> None:
    head = tasks_of().tasks("train")[:40]
    assert {task.data["dataset"] for task in head} == {"chain_sum", "products"}


def test_tasks_are_plain_and_equal_in_another_process() -> None:
    tasks = tasks_of().tasks("eval")
    text = json.dumps([[task.id, dict(task.data)] for task in tasks])
    assert [Task(key, data) for key, data in json.loads(text)] == list(tasks)
    program = f"""
import json
from keel.envs.reasoning_gym import ReasoningGymTasks
source = ReasoningGymTasks({MIXTURE!r}, size=300, seed=0, eval_share=0.25)
print(json.dumps([[task.id, dict(task.data)] for task in source.tasks("eval")]))
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert printed.stdout.strip() == text


def test_nearby_seeds_give_other_tasks() -> None:
    first, second = (
        {task.id for task in tasks_of(seed=seed, size=200, chain_sum={"max_digits": 4}).tasks("train")}
        for seed in (0, 1)
    )
    assert len(first & second) < 0.1 * len(first)


def test_one_data_set_twice_under_labels() -> None:
    source = tasks_of(
        easy={"name": "chain_sum", "max_digits": 1, "max_terms": 2}, hard={"name": "chain_sum", "min_digits": 3}
    )
    assert {task.data["dataset"] for task in source.tasks("train")} == {"easy", "hard"}


def test_a_task_of_other_options_is_refused_not_misjudged() -> None:
    task = tasks_of(seed=0).tasks("train")[0]
    with pytest.raises(EnvError, match="another seed"):
        tasks_of(seed=5).score(task, "1")
    with pytest.raises(EnvError, match="data set"):
        tasks_of(leg_counting={}).score(task, "1")


@pytest.mark.parametrize(
    ("datasets", "mentions"),
    [
        ({"chain_sums": {}}, "did you mean 'chain_sum'"),
        ({"chain_sum": {"max_term": 3}}, "max_term"),
        ({"chain_sum": {"min_terms": 9, "max_terms": 2}}, "refuses"),
        ({}, "no data set"),
    ],
)
def test_wrong_data_sets_are_refused(datasets: dict[str, dict[str, object]], mentions: str) -> None:
    with pytest.raises(ValueError, match=mentions):
        ReasoningGymTasks(datasets, size=10, seed=0, eval_share=0.2)


@pytest.mark.parametrize("name", ["leg_counting", "spell_backward", "gcd", "word_sorting", "basic_arithmetic", "maze"])
def test_any_data_set_can_be_played(name: str) -> None:
    assert name in DATASETS
    env = ReasoningGymEnv(datasets={name: {}}, size=12, instructions="Answer only.")
    task = env.tasks("train")[0]
    messages = env.reset(task)
    assert [message.role for message in messages] == ["developer", "user"]
    assert messages[1].content == task.data["question"]
    step = env.step(answer(task.data["answer"]))
    assert (step.done, step.reward, step.success) == (True, 1.0, True)


def test_partial_credit_is_a_reward_but_no_success() -> None:
    env = ReasoningGymEnv(datasets={"chain_sum": {"min_digits": 3, "max_digits": 3}}, size=20)
    task = env.tasks("train")[0]
    env.reset(task)
    step = env.step(answer(f"It is {task.data['answer']}"))
    assert 0.0 < step.reward < 1.0
    assert step.success is False


def test_no_final_answer_ends_with_nothing() -> None:
    env = ReasoningGymEnv(size=20)
    env.reset(env.tasks("train")[0])
    assert env.step(Reply((), "", "no channel")).reward == 0.0
