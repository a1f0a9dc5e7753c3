"""Tasks out of somebody's data: reading, refusing, splitting, prompting, scoring."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
import random
import threading
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

import keel
from keel.chat.base import Reply
from keel.config import EnvConfig, TrainConfig
from keel.config_plugins import check_plugins
from keel.envs.load import env_factory
from keel.envs.rows import DataError
from keel.envs.task_env import TaskEnvFactory, task_env
from keel.envs.tools import ToolDeclarationError
from keel.plugins import name_of
from keel.rewards import exact_match
from keel.rewards.base import RewardError, Score
from keel.rewards.parts import RewardDeclarationError
from keel.types import Message, Segment, Task, TokenSpan, Trajectory, Turn

ROWS = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(200)]


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def is_short(trajectory: Trajectory, task: Task) -> float:
    return float(len(trajectory.turns[-1].reply_text) < 4)


def write_lines(path: Path, lines: list[bytes | str]) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "rows.jsonl", [json.dumps(row) for row in ROWS])


def split(factory: TaskEnvFactory) -> tuple[list[Task], list[Task]]:
    env = factory()
    return list(env.tasks("train")), list(env.tasks("eval"))


def questions(tasks: list[Task]) -> set[str]:
    return {task.data["question"] for task in tasks}


def episode(answer: str, task: Task, *, prompt: tuple[Message, ...] = (), malformed: str | None = None) -> Trajectory:
    reply = () if malformed else (Message("assistant", answer, channel="final"),)
    turn = Turn(reply, answer, "stop", 0, 1, malformed=malformed)
    spans = (TokenSpan((7, 8), "context"), TokenSpan((9,), "demonstration"))
    return Trajectory(task, "g", 0, prompt or (Message("user", "?"),), (turn,), (Segment(spans),), "completed")


def judged(factory: TaskEnvFactory, answer: str, task: Task, **options: Any) -> Score:
    env = factory()
    prompt = tuple(env.reset(task))  # type: ignore[arg-type]
    return asyncio.run(env.judge(episode(answer, task, prompt=prompt, **options), task))


# Reading


def test_all_sources_give_the_same_tasks(jsonl: Path, tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=7)
    sources = [jsonl, str(jsonl), ROWS, tuple(ROWS), tmp_path / "rows.parquet", datasets.Dataset.from_list(ROWS)]
    found = [split(task_env(source)) for source in sources]
    assert all(each == found[0] for each in found[1:])
    train, held_out = found[0]
    assert (len(train), len(held_out)) == (180, 20)
    assert questions(train) | questions(held_out) == {row["question"] for row in ROWS}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": ', "it is not JSON"),
        (b'["a"]', "it is a JSON list, not an object; is the file one JSON array"),
        (b'"text"', "it is a JSON str, not an object"),
        (b'{"question": "\xff"}', "it is not UTF-8"),
        (b'{"question": "a", "answer": NaN}', "NaN is no JSON number"),
        (b'{"question": "a", "answer": "\\ud800"}', "half of a surrogate pair"),
        (b'{"question": "a", "answer": ' + b"9" * 5000 + b"}", "it is not JSON"),
        (b'{"question": "a", "answer": ' + b"[" * 100_000 + b"}", "it is not JSON"),
        (b'{"quest": "a", "answer": "b"}', "column 'question' is missing"),
        (b'{"question": null, "answer": "b"}', "column 'question' is null"),
        (b'{"question": 5, "answer": "b"}', "a prompt is a text or a list of messages; got int 5"),
        (b'{"question": "a"}', "column 'answer' is missing"),
    ],
)
def test_a_broken_row_is_refused_by_line_or_left_out(tmp_path: Path, line: bytes, reason: str) -> None:
    lines: list[bytes | str] = [json.dumps(row) for row in ROWS]
    path = write_lines(tmp_path / "rows.jsonl", [*lines[:156], line, *lines[156:]])
    with pytest.raises(DataError) as refused:
        task_env(path, reward="exact_match")
    assert f"{path}:157: " in str(refused.value)
    assert reason in str(refused.value)
    assert 'on_bad_row="skip"' in str(refused.value)
    with pytest.warns(UserWarning, match="skipped 1 of 201 rows; the first: .*:157"):
        made = task_env(path, reward="exact_match", on_bad_row="skip")
    assert (made.num_train, made.num_eval, made.num_skipped) == (180, 20, 1)
    assert split(made) == split(task_env(ROWS, reward="exact_match"))


def test_windows_and_unicode_files_are_read(tmp_path: Path) -> None:
    rows = [
        {"question": "¿Qué? \u2028 \x85 日本 🚢 {braces} </script>", "answer": "é"},
        {"question": "b", "answer": ""},
    ]
    text = "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows) + "\r\n\n"
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text.encode())
    train, held_out = split(task_env(path, eval_share=0.5))
    assert sorted((dict(task.data) for task in train + held_out), key=lambda row: row["answer"]) == rows[::-1]


def test_a_huge_row_is_a_row(tmp_path: Path) -> None:
    rows = [{"question": "x" * 10_000_000, "answer": "1"}, *ROWS[:3]]
    train, held_out = split(task_env(write_lines(tmp_path / "rows.jsonl", [json.dumps(row) for row in rows])))
    assert max(len(task.data["question"]) for task in train + held_out) == 10_000_000


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "data has no rows"),
        (b"", "has no rows"),
        (b"\n\r\n  \n", "has no rows"),
        (b"[1]\n[2]\n", "no row of .* can be used"),
        ("missing.jsonl", "there is no file missing.jsonl"),
        ([5, 6], "no row of data can be used; the first: data.0.: it is a int"),
        ([{1: 2}], "column names are strings; got 1"),
        ({"question": ["a"]}, 'needs "train"'),
        (5, "data is a int"),
        (iter(ROWS), "data is a list_iterator"),
        ("a,b\n", "there is no file"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path: Path, data: Any, said: str) -> None:
    if isinstance(data, bytes):
        data = write_lines(tmp_path / "rows.jsonl", [data])
    with pytest.raises(DataError, match=said):
        task_env(data)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither JSON lines nor parquet"):
        task_env(write_lines(tmp_path / "rows.csv", ["a,b"]))
    with pytest.raises(DataError, match="cannot be read as parquet"):
        task_env(write_lines(tmp_path / "rows.parquet", ["a,b"]))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"\x89PNG", "holds bytes"),
        (math.nan, "holds nan"),
        ({"deep": [{"er": {1, 2}}]}, "holds a set"),
        (1 + 2j, "holds a complex"),
    ],
)
def test_a_value_that_is_no_json_names_its_column(value: Any, said: str) -> None:
    rows = [*ROWS, {"question": "q", "extra": value}]
    with pytest.raises(DataError, match=rf"data\[200\]: column 'extra' {said}.*columns="):
        task_env(rows)
    assert task_env(rows, columns=["question"]).num_train == 181


def test_a_parquet_files_bytes_are_named_and_left_out_on_demand(tmp_path: Path) -> None:
    table = pa.table({"question": ["a", "b"], "image": [{"bytes": b"\x89PNG"}] * 2})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet, row 0: column 'image' holds bytes"):
        task_env(tmp_path / "rows.parquet")
    train, held_out = split(task_env(tmp_path / "rows.parquet", columns=["question"]))
    assert [set(task.data) for task in train + held_out] == [{"question"}] * 2


def test_a_dataset_with_images_is_refused_before_one_is_decoded() -> None:
    features = datasets.Features({"question": datasets.Value("string"), "photo": datasets.Image()})
    data = datasets.Dataset.from_list(
        [{"question": q, "photo": {"bytes": b"no image"}} for q in "ab"], features=features
    )
    with pytest.raises(DataError, match=r"'photo' holds images.*columns=\['question'\]"):
        task_env(data)
    assert task_env(data.add_column("n", [1, 2]), columns=["question", "n"]).num_train == 1
    with pytest.raises(DataError, match="IterableDataset"):
        task_env(data.to_iterable_dataset())


def test_the_splits_of_a_dataset_dict_are_kept() -> None:
    given = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS[:50]), test=datasets.Dataset.from_list(ROWS[50:80])
    )
    train, held_out = split(task_env(given))
    assert questions(train) == {row["question"] for row in ROWS[:50]}
    assert questions(held_out) == {row["question"] for row in ROWS[50:80]}
    assert task_env({"train": ROWS}).num_eval == 20


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install 'keel-rl\[data\]'"):
        task_env(tmp_path / "rows.parquet")
    assert task_env(ROWS).num_train == 180


# Splitting


def test_the_split_is_made_of_content_alone() -> None:
    shuffled = [dict(reversed(row.items())) for row in ROWS]
    random.Random(3).shuffle(shuffled)
    assert split(task_env(shuffled)) == split(task_env(ROWS))
    assert questions(split(task_env(ROWS, seed=1))[1]) != questions(split(task_env(ROWS))[1])


def test_rows_of_one_prompt_never_stand_on_both_sides() -> None:
    twins = [{**row, "id": n} for row in ROWS for n in range(3)] + ROWS + ROWS
    made = task_env(twins, prompt="{question}", eval_share=0.3)
    train, held_out = split(made)
    assert made.num_duplicates == 200
    assert len({task.id for task in train + held_out}) == len(train + held_out) == 800
    assert not questions(train) & questions(held_out)
    assert len(questions(held_out)) == 60


@pytest.mark.parametrize(("share", "rows", "held_out"), [(0.0, 200, 0), (1.0, 200, 200), (0.01, 5, 1), (0.1, 1, 0)])
def test_how_many_are_held_out(share: float, rows: int, held_out: int) -> None:
    made = task_env(ROWS[:rows], eval_share=share)
    assert (made.num_train, made.num_eval) == (rows - held_out, held_out)


def test_tasks_held_out_separately_are_not_trained_on() -> None:
    with pytest.warns(UserWarning, match="10 tasks of data are in eval_data too"):
        train, held_out = split(task_env(ROWS, eval_data=[*ROWS[50:60], {"question": "new", "answer": "1"}]))
    assert (len(train), len(held_out)) == (190, 11)
    assert not questions(train) & questions(held_out)


def test_instances_share_their_tasks_and_a_pickle_reads_them_again(jsonl: Path) -> None:
    made = task_env(jsonl, reward=[is_short, ("exact_match", 2.0)], tools=[add], success=0.5)
    assert made().tasks("train") is made().tasks("train")
    pickled = pickle.dumps(made)
    assert len(pickled) < 1000  # a path, not 200 rows
    assert split(pickle.loads(pickled)) == split(made)


def test_a_task_can_be_played_from_its_record(jsonl: Path) -> None:
    """What trajectories/*.jsonl keeps of a task is enough to ask it again."""
    env = task_env(jsonl, prompt="Q: {question}")()
    task = env.tasks("train")[0]
    kept = Task(task.id, json.loads(json.dumps(dict(task.data))))
    assert env.reset(kept) == env.reset(task)


# Prompting


def asked(prompt: Any, row: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    env = task_env([row], prompt=prompt, **options)()
    return [(message.role, message.content) for message in env.reset(env.tasks("train")[0])]  # type: ignore[union-attr]


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi", "tool_calls": None}]


@pytest.mark.parametrize(
    ("prompt", "row", "expected"),
    [
        ("q", {"q": "{a} <b>"}, [("user", "{a} <b>")]),
        (None, {"prompt": "p", "question": "q"}, [("user", "p")]),
        ("{a}: {b:.1f} {{x}} {a}", {"a": "{b}", "b": 2}, [("user", "{b}: 2.0 {x} {b}")]),
        (lambda row: row["q"].upper(), {"q": "a"}, [("user", "A")]),
        (
            lambda row: [Message("developer", "d"), {"role": "user", "content": "u"}],
            {"q": "a"},
            [("developer", "d"), ("user", "u")],
        ),
        (None, {"messages": CHAT}, [("system", "Be brief."), ("user", "Hi")]),
        (
            "c",
            {"c": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            [("user", "ab")],
        ),
    ],
)
def test_prompts(prompt: Any, row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert asked(prompt, row) == expected


def test_a_system_message_comes_first() -> None:
    assert asked("q", {"q": "a"}, system="Be brief.") == [("system", "Be brief."), ("user", "a")]


@pytest.mark.parametrize(
    ("prompt", "row", "said"),
    [
        ("qestion", {"question": "a"}, "neither a column .there are: question. nor a template"),
        ("{qestion}", {"question": "a"}, "field {qestion}, but the data has the columns question"),
        ("{question.__class__}", {"question": "a"}, "field {question.__class__}"),
        ("{question", {"question": "a"}, "no template: .*write braces that are text twice"),
        (None, {"text": "a"}, "no prompt is named"),
        (lambda row: row["nope"], {"q": "a"}, "prompt function raised KeyError: 'nope'"),
        (lambda row: None, {"q": "a"}, "a prompt is a text or a list of messages; got NoneType"),
        (lambda row: [], {"q": "a"}, "a prompt is a text or a list of messages"),
        ("{a:.1f}", {"a": "x"}, "the template cannot format it"),
        (
            "c",
            {"c": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "the policy speaks next",
        ),
        ("c", {"c": [{"role": "tutor", "content": "a"}]}, "role is one of .* got str 'tutor'"),
        ("c", {"c": [{"content": "a"}]}, 'a message is {"role"'),
        ("c", {"c": [{"role": "user", "content": [{"type": "image"}]}]}, "trains on text alone"),
        ("c", {"c": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "got 'tool_calls'"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(prompt: Any, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        task_env([row], prompt=prompt)
    with pytest.raises(DataError, match="leave system= out"):
        task_env([{"messages": CHAT}], system="s")


# Scoring


@pytest.mark.parametrize(("answer", "reward", "success"), [("4", 1.0, True), (" 4\n", 1.0, True), ("5", 0.0, False)])
def test_exact_match_reads_the_named_column(answer: str, reward: float, success: bool) -> None:
    made = task_env([{"question": "2 + 2?", "solution": 4}], reward="exact_match", answer="solution")
    assert judged(made, answer, made().tasks("train")[0]) == Score(reward, {"exact_match": reward}, success)


async def later(trajectory: Trajectory, task: Task) -> float:
    await asyncio.sleep(0)
    return float(task.data["answer"])


def test_several_rewards_have_names_and_weights() -> None:
    made = task_env(ROWS[1:2], reward=["exact_match", (is_short, -0.25), (later, 0.5)], success=1.5)
    task = made().tasks("train")[0]
    assert judged(made, "2", task) == Score(1.0 - 0.25 + 1.0, {"exact_match": 1.0, "is_short": 1.0, "later": 2.0}, True)
    assert judged(made, "long", task).reward == 1.0
    assert judged(made, "long", task).success is False


def test_success_may_be_a_function_or_unsaid() -> None:
    def right(trajectory: Trajectory, task: Task) -> bool:
        return exact_match(trajectory, task) == 1.0

    def scored(trajectory: Trajectory, task: Task) -> bool:
        return (trajectory.reward, trajectory.reward_parts) == (0.5, {"is_short": 1.0, "exact_match": 0.0})

    two = [is_short, ("exact_match", 0.5)]
    assert judged(task_env(ROWS[1:2], reward=two, success="exact_match"), "3", Task("t", ROWS[1])).success is False
    assert judged(task_env(ROWS[1:2], reward=two, success="exact_match"), "2", Task("t", ROWS[1])).success is True
    halves = task_env(ROWS[1:2], reward=[(is_short, 0.5), "exact_match"], success=scored)
    assert [judged(halves, answer, Task("t", ROWS[1])).success for answer in ("3", "2")] == [True, False]
    made = task_env(ROWS[1:2], reward=is_short, success=right)
    task = made().tasks("train")[0]
    assert [judged(made, answer, task).success for answer in ("2", "3")] == [True, False]
    assert judged(task_env(ROWS[1:2], reward=is_short, success=None), "2", task).success is None
    assert judged(task_env(ROWS[1:2]), "2", task) == Score(0.0)
    with pytest.raises(RewardError, match=r"success\(\) returns True or False; got float"):
        judged(task_env(ROWS[1:2], success=exact_match), "2", task)


def grades(prompts: list[Any], completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    SEEN.append((prompts, completions, {"answer": answer, **columns}))
    return [0.75]


SEEN: list[Any] = []


def test_a_reward_in_trls_style_gets_lists_of_one() -> None:
    made = task_env([{"messages": CHAT, "answer": "4", "level": 3}], reward=grades)
    task = made().tasks("train")[0]
    SEEN.clear()
    assert judged(made, "four", task) == Score(0.75, {"grades": 0.75}, False)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    columns = {"answer": ["4"], "level": [3], "messages": [CHAT], "completion_ids": [[]]}
    assert [([chat], [[{"role": "assistant", "content": "four"}]], columns)] == SEEN


def test_a_reward_in_trls_style_gets_texts_for_a_prompt_that_is_one() -> None:
    made = task_env([{"question": "2 + 2?", "answer": "4"}], prompt="Q: {question}", reward=grades)
    task = made().tasks("train")[0]
    SEEN.clear()
    judged(made, "four", task)
    judged(made, "<|unreadable", task, malformed="no end")
    assert [(prompts, completions) for prompts, completions, _ in SEEN] == [
        (["Q: 2 + 2?"], ["four"]),
        (["Q: 2 + 2?"], ["<|unreadable"]),
    ]


def test_tool_calls_are_part_of_a_completion_in_trls_style() -> None:
    made = task_env([{"messages": CHAT, "answer": "4"}], reward=grades, tools=[add])
    env = made()
    task = env.tasks("train")[0]
    call = Message("assistant", '{"a": 2, "b": 2}', channel="commentary", recipient="functions.add")
    step = asyncio.run(env.step(Reply((call,), "raw")))
    assert not step.done
    first = Turn((call,), "raw", "stop", 0, 1, observation=step.messages)
    last = Turn((Message("assistant", "4", channel="final"),), "4", "stop", 0, 3)
    spans = (TokenSpan((1,), "context"),)
    trajectory = Trajectory(task, "g", 0, env.reset(task), (first, last), (Segment(spans),), "completed")  # type: ignore[arg-type]
    SEEN.clear()
    asyncio.run(env.judge(trajectory, task))
    function = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    assert SEEN[0][1] == [
        [
            {"role": "assistant", "content": "", "tool_calls": [function]},
            {"role": "tool", "content": "4", "name": "add"},
            {"role": "assistant", "content": "4"},
        ]
    ]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "reward score returns a finite number; got NoneType None"),
        (math.nan, "got float nan"),
        (math.inf, "got float inf"),
        ("1.0", "got str '1.0'"),
        ([1.0], "got list"),
        (1 + 0j, "got complex"),
    ],
)
def test_nonsense_is_an_error_and_never_a_zero(returned: Any, said: str) -> None:
    def score(trajectory: Trajectory, task: Task) -> Any:
        return returned

    def trl(completions: Any, **columns: Any) -> Any:
        return [returned]

    made = task_env(ROWS[1:2], reward=score)
    with pytest.raises(RewardError, match=said):
        judged(made, "2", made().tasks("train")[0])
    with pytest.raises(RewardError, match=said.replace("score", "trl")):
        judged(task_env(ROWS[1:2], reward=trl), "2", made().tasks("train")[0])


@pytest.mark.parametrize("returned", [[], [1.0, 2.0], 1.0, None, "1"])
def test_a_list_of_another_length_is_an_error(returned: Any) -> None:
    made = task_env(ROWS[1:2], reward=lambda completions, **columns: returned)
    with pytest.raises(RewardError, match="returns a list of 1 number"):
        judged(made, "2", made().tasks("train")[0])


def test_a_reward_that_raises_is_told_with_its_place() -> None:
    def broken(trajectory: Trajectory, task: Task) -> float:
        raise ValueError("no such file")

    made = task_env(ROWS[1:2], reward=["exact_match", broken])
    with pytest.raises(RewardError, match=r"reward broken raised ValueError: no such file \(test_task_env.py:\d+\)"):
        judged(made, "2", made().tasks("train")[0])


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ([], "empty list"),
        (lambda trajectory: 1.0, "a reward is .trajectory, task. -> float"),
        (lambda a, b, c: 1.0, "a reward is .trajectory, task. -> float"),
        (5, "got int 5"),
        ([(exact_match, "much")], "a reward is a function"),
        ([(exact_match, math.nan)], "the weight of reward exact_match is a finite number"),
        ([is_short, is_short], "two rewards are named 'is_short'"),
    ],
)
def test_what_is_no_reward_is_refused_at_once(reward: Any, said: str) -> None:
    with pytest.raises(RewardDeclarationError, match=said):
        task_env(ROWS, reward=reward)


def test_a_trl_reward_needs_its_columns_in_every_row() -> None:
    def by_level(completions: Any, level: Any) -> list[float]:
        return [1.0]

    with pytest.raises(DataError, match=r"data\[1\]: column 'level' is missing"):
        task_env([{"question": "a", "level": 1}, {"question": "b"}], reward=by_level)


def test_other_faults_are_told_when_the_environment_is_made() -> None:
    def untyped(x):  # type: ignore[no-untyped-def]
        """Do."""

    for options in ({"eval_share": 1.5}, {"on_bad_row": "drop"}, {"columns": "question"}):
        with pytest.raises(DataError):
            task_env(ROWS, **options)  # type: ignore[arg-type]
    with pytest.raises(ToolDeclarationError):
        task_env(ROWS, tools=[untyped])
    with pytest.raises(RewardDeclarationError, match="success"):
        task_env(ROWS, success="yes")  # type: ignore[arg-type]
    with pytest.raises(keel.plugins.PluginError, match="exact_match"):
        task_env(ROWS, reward="exact_mach")


def test_demonstrations_are_right_answers_and_the_same_every_time() -> None:
    env = task_env(ROWS, reward="exact_match")()
    found = env.demonstrations(30, seed=5, start=10)
    assert list(found[5:]) == list(env.demonstrations(25, seed=5, start=15))
    held_out = {task.id for task in env.tasks("eval")}
    for demonstration in found:
        assert demonstration.task.id not in held_out
        assert [[m.content for m in reply] for reply in demonstration.replies] == [[demonstration.task.data["answer"]]]
    with pytest.raises(keel.envs.base.NoDemonstrationsError, match="name it with answer="):
        task_env([{"question": "a"}])().demonstrations(1, seed=0, start=0)


# In a config


def test_a_config_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(threading)("own_env")
    module.env = task_env(ROWS, reward="exact_match")  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "own_env", module)
    config = TrainConfig.model_validate({"env": {"id": "own_env:env"}})
    assert check_plugins(config, str) == []  # type: ignore[arg-type]
    assert len(env_factory(EnvConfig(id="own_env:env"))().tasks("eval")) == 20


def test_a_config_calls_it_by_its_data(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "my <rows>:1.jsonl", [json.dumps(row) for row in ROWS])
    assert name_of(task_env(path)) == "keel:task_env(my__rows__1.jsonl).<object>"
    assert name_of(pickle.loads(pickle.dumps(task_env(ROWS)))) == "keel:task_env(data).<object>"


def test_its_own_functions_can_be_found() -> None:
    """A run keeps the source of what they refer to."""
    made = task_env(ROWS, reward=[is_short, (later, 2.0), "exact_match"], tools=[add, keel.tool(add, name="plus")])
    assert made.functions == (is_short, later, add, add)
