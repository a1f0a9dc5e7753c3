"""`keel new NAME`: a directory to start from, with an environment, a config and a test that run as they are."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated, Any

import typer

from keel.config_schema import toml_value
from keel.monitor.printable import one_line

if TYPE_CHECKING:
    from keel.envs.task_env import TaskEnvFactory

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
TINY_REPLY_TOKENS = 24  # markers of the chat format around a short answer, and some room to babble
TINY_LIMIT_TOKENS = 2048
MICRO_BATCH_TOKENS = 4096
ANSWER = "answer"
REPLY_TOKENS = 512
SCANNED_ROWS = 1000
WARM_START = """
[warm_start]
# Supervised steps on the environment's demonstrations, before reinforcement: they teach a model that knows nothing how
# an answer looks.
steps = 80
demonstrations_per_step = 32
optim = { lr = 4e-3, schedule = "linear", warmup_steps = 10 }
"""
EVALUATION = """
[eval]
num_tasks = {num_tasks}  # held-out tasks, before, between and after the stages
"""
OWN_REWARD = '''
def reward(trajectory, task):
    """A place to begin: any answer that can be read is worth 1. Say here what a good one is, on a scale of your own."""
    return 1.0 if final_answer(trajectory) else 0.0

'''
TEST_RIGHT = """
def test_the_right_answer_earns_more_than_a_wrong_one():
    task = env().tasks("train")[0]
    assert earned(task, str(task.data[{answer}])) > earned(task, "no answer of any row")
"""
TEST_FINITE = """
def test_the_reward_is_a_number_for_any_answer():
    task = env().tasks("train")[0]
    assert all(math.isfinite(earned(task, answer)) for answer in ("", "42", "a long answer " * 100))
"""


@dataclass(frozen=True)
class Starter:
    """What fills the templates of `folder`; `data` is copied beside them as `rows_name`."""

    folder: str
    data: Path
    rows_name: str
    values: Mapping[str, str]
    num_eval: int
    longest_prompt: int  # bytes, which are at least as many as tokens
    longest_answer: int
    demonstrates: bool


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Directory to make, here; letters, digits, _ and -.")],
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Start from these rows (JSONL, parquet), with keel.task_env.")
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="With --data: column that is asked, or a template such as 'Solve: {question}'.")
    ] = "",
    answer: Annotated[
        str, typer.Option(help="With --data: column of right answers; without it 'answer', if there is one.")
    ] = "",
    model: Annotated[
        str, typer.Option(metavar="PATH", help="Starting weights; without it a small model made for the run.")
    ] = "",
) -> None:
    """Write a directory NAME with env.py, run.toml and test_env.py that run as they are."""
    if not NAME.fullmatch(name):
        what = f"got {name!r}: a letter, then at most 63 letters, digits, _ and -; it is made in the current directory"
        raise typer.BadParameter(what, param_hint="NAME")
    if os.path.lexists(name):
        raise typer.BadParameter(f"{name} exists already, and is left as it is; choose another", param_hint="NAME")
    if data is None and (prompt or answer):
        raise typer.BadParameter("is about the columns of --data; give both", param_hint="--prompt, --answer")
    if model.startswith(("/", ".", "~")) and not Path(model).is_dir():
        raise typer.BadParameter(f"there is no directory {model}", param_hint="--model")
    starter = own_starter(name) if data is None else rows_starter(name, data, prompt, answer)
    texts = rendered(starter, name, model)
    write_directory(Path(name), texts, starter)
    print(f"wrote {', '.join(sorted([*texts, starter.rows_name]))} to {name}")
    if not starter.demonstrates:
        print(
            f"note: no column {ANSWER!r}, so the reward in {name}/env.py is a place to begin, which takes any answer; "
            "write your own, or name the column of right answers with --answer"
        )
    print(f"next: cd {name} && keel rollout run.toml")


def own_starter(name: str) -> Starter:
    """A class of its own over a few rows that come with Keel."""
    class_name = "".join(part[:1].upper() + part[1:] for part in re.split(r"[_-]+", name)) + "Env"
    data = Path(str(files("keel").joinpath("starters", "own", "tasks.jsonl")))
    values = {"class_name": class_name, "env": class_name}
    return Starter("own", data, "tasks.jsonl", values, 40, 40, 8, demonstrates=True)


def rows_starter(name: str, data: Path, prompt: str, answer: str) -> Starter:
    """`keel.task_env` over the user's rows. Raises DataError if no tasks can be made of them."""
    import keel
    from keel.envs.prompts import USUAL_COLUMNS, NoPromptError

    try:
        found = keel.task_env(str(data), prompt=prompt or None)
    except NoPromptError as error:
        what = (
            f"{data} has none of the columns {', '.join(USUAL_COLUMNS)} (it has: {one_line(', '.join(error.columns))})"
        )
        raise typer.BadParameter(f"{what}; name one, or give a template", param_hint="--prompt") from None
    has_answer = bool(answer) or any(ANSWER in task.data for task in _some(found))
    answer = answer or ANSWER
    if has_answer:  # once more, with the reward that the file will have: every row must be fit for it
        found = keel.task_env(str(data), prompt=prompt or None, answer=answer, reward="exact_match")
    rows_name = "rows.parquet" if data.suffix == ".parquet" else "rows.jsonl"
    values = {
        "env": "env",
        "imports": "" if has_answer else "from keel.rewards.answers import final_answer\n",
        "rows_name": rows_name,
        "prompt": _quoted(prompt or next(column for column in USUAL_COLUMNS if column in _some(found)[0].data)),
        "reward_function": "" if has_answer else OWN_REWARD,
        "reward": '"exact_match"' if has_answer else "reward",
        "answer": f"answer={_quoted(answer)},  # the column of right answers" if has_answer else "success=1.0,",
        "test_imports": "" if has_answer else "import math\n",
        "reward_test": TEST_RIGHT.format(answer=_quoted(answer)) if has_answer else TEST_FINITE,
        "name": name,
    }
    made = found()
    prompts = [sum(len(message.content.encode()) for message in made.reset(task)) for task in _some(found)]
    answers = [len(str(task.data[answer]).encode()) for task in _some(found)] if has_answer else [0]
    num_eval = min(64, found.num_eval)
    return Starter("rows", data, rows_name, values, num_eval, max(prompts), max(answers), demonstrates=has_answer)


def _quoted(text: str) -> str:
    """A literal of Python, with double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _some(found: TaskEnvFactory) -> list[Any]:
    tasks = found().tasks("train")
    return [tasks[index] for index in range(min(SCANNED_ROWS, len(tasks)))]


def rendered(starter: Starter, name: str, model: str) -> dict[str, str]:
    """The files' names and texts."""
    room = files("keel").joinpath("starters")
    kind = "run_model" if model else "run_tiny"
    templates = {
        "env.py": room.joinpath(starter.folder, "env.py.template"),
        "test_env.py": room.joinpath(starter.folder, "test_env.py.template"),
        "run.toml": room.joinpath(f"{kind}.toml.template"),
        "README.md": room.joinpath("README.md.template"),
    }
    reply = REPLY_TOKENS if model else TINY_REPLY_TOKENS + starter.longest_answer
    room_needed = starter.longest_prompt + reply + (512 if model else 64)  # and what the chat format adds
    limit = room_needed if model else min(TINY_LIMIT_TOKENS, room_needed)
    local = bool(model) and Path(model).is_dir()
    values = {
        "name": name,
        "rows_name": starter.rows_name,
        "model": toml_value(str(Path(model).resolve()) if local else model),
        "max_tokens": str(max(MICRO_BATCH_TOKENS, _rounded_up(limit))),
        "max_turns": "1" if starter.folder == "own" else "4",
        "max_new_tokens": str(min(reply, limit // 2)),
        "max_sequence_tokens": str(_rounded_up(limit)),
        "warm_start": WARM_START if starter.demonstrates else "",
        "evaluation": EVALUATION.format(num_tasks=starter.num_eval) if starter.num_eval else "",
        **starter.values,
    }
    return {name: Template(path.read_text(encoding="utf-8")).substitute(values) for name, path in templates.items()}


def _rounded_up(tokens: int) -> int:
    return -(-tokens // 32) * 32


def write_directory(path: Path, texts: Mapping[str, str], starter: Starter) -> None:
    """Make the directory with its files; nothing is left if that fails half-way."""
    path.mkdir()  # fails if somebody else was quicker
    try:
        for name, text in texts.items():
            (path / name).write_text(text, encoding="utf-8")
        shutil.copyfile(starter.data, path / starter.rows_name)
    except BaseException:
        shutil.rmtree(path)
        raise
