"""Tasks of your own without a class: data, a prompt, a reward, perhaps tools.

    env = keel.task_env("train.jsonl", prompt="{question}", reward="exact_match")
    keel.train("run.toml", env=env)

or, in a file env.py beside run.toml, the first line, and in run.toml `[env] id = "env:env"`.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

from keel.envs.base import Demonstration, NoDemonstrationsError, Step
from keel.envs.base import Split as SplitName
from keel.envs.calls import call_with_timeout
from keel.envs.prompts import Prompt, PromptFunction
from keel.envs.rows import DataError, both_splits, open_rows
from keel.envs.task_split import OnBadRow, Split, columns_of, split_as_given, split_by_content
from keel.envs.threads import HangingCallsError
from keel.envs.tool_env import OnMalformed, ToolEnv
from keel.envs.tools import Tool
from keel.plugins import resolve
from keel.rewards.answers import exact_match
from keel.rewards.base import RewardError, Score
from keel.rewards.parts import (
    RewardDeclarationError,
    RewardPart,
    Rewards,
    TrlReward,
    as_list,
    as_parts,
    failure,
    is_weighted,
)
from keel.types import Message, Task, Trajectory

Success = float | str | Callable[[Trajectory, Task], bool] | None
_NO_LIMIT_S = 1e6  # the episode has a limit of its own for all of the judging (env.step_timeout_s)


def task_env(  # noqa: PLR0913 (a knob each, and all but the data by name)
    data: Any,
    *,
    reward: Rewards | None = None,
    tools: Sequence[Tool | Callable[..., Any]] = (),
    prompt: str | PromptFunction | None = None,
    system: str = "",
    answer: str = "answer",
    success: Success = 1.0,
    eval_share: float = 0.1,
    eval_data: Any = None,
    seed: int = 0,
    columns: Sequence[str] | None = None,
    on_bad_row: OnBadRow = "refuse",
    on_malformed: OnMalformed = "end",
) -> TaskEnvFactory:
    """An environment of your own tasks: what `keel.train(env=...)` takes, or, as a module's name, `[env] id`.

    `data`: the path of a JSONL or parquet file, a list of dicts, a `datasets.Dataset`, or a mapping (a `DatasetDict`)
    with "train" and, if there is one, "test", "validation" or "eval". `columns` leaves all others out.

    `prompt`: a column (a text, or a chat: a list of {"role", "content"}), a template ("Solve: {question}"), or a
    function of the row that returns a text or a chat; without it the first of the columns prompt, messages, question.
    It must give the same for the same row every time. `system` is a system message put before it.

    `reward`: `(trajectory, task) -> float`, plain or async; a built-in's name ("exact_match" compares with the column
    `answer`); a function in TRL's style, `(prompts, completions, **columns) -> list`, called with lists of length 1;
    or a list of these, or of pairs (reward, weight). `task.data` is the row. One that raises, or returns anything but
    a finite number, makes the episode `env_error`, never a zero. Without it the config's `[env.reward]` is all.

    `success`: the reward from which on an episode is one; the name of the reward among several that says so by reaching
    1.0; a function `(trajectory, task) -> bool`, which finds the rewards in the trajectory; or None: not said.

    `tools`: typed functions with a docstring; the agent may call them before it answers. `on_malformed`: "end", or
    "answer" to tell the agent and go on.

    Held out are `eval_share` of the prompts, chosen by a hash of their content and `seed`, or all of `eval_data`. Equal
    rows are one task. `on_bad_row` "skip" leaves rows that cannot be used out, with a warning.

    Demonstrations, for a warm start or a tiny model, are answers of the column `answer`, without tools.

    Raises DataError (which row of which file, what, and the fix), RewardDeclarationError, PluginError,
    ToolDeclarationError.
    """
    return TaskEnvFactory(dict(locals()))


class TaskEnvFactory:
    """Makes environments over one set of tasks, which is read once. Made by `task_env`; picklable if its parts are."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._prompt, self._parts, self._split = _loaded(**options)
        self.functions = _functions(**options)
        # What a config, and so a report, calls it: keel:task_env(train.jsonl).<object>
        self.__module__, self.__qualname__ = "keel", f"task_env({_name_of(options['data'])})"
        self()  # tools that cannot be tools are refused now, not in the first episode

    def __call__(self) -> TaskEnv:
        options = self._options
        return TaskEnv(
            self._split,
            self._prompt,
            self._parts,
            tools=options["tools"],
            success=options["success"],
            answer=options["answer"],
            on_malformed=options["on_malformed"],
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return TaskEnvFactory, (self._options,)  # by its options: a file is read again, a worker's memory stays small

    @property
    def num_train(self) -> int:
        return len(self._split.train)

    @property
    def num_eval(self) -> int:
        return len(self._split.eval)

    @property
    def num_duplicates(self) -> int:
        """Rows that repeat another."""
        return self._split.num_duplicates

    @property
    def num_skipped(self) -> int:
        """Rows left out because they cannot be used."""
        return self._split.num_skipped

    def __repr__(self) -> str:
        skipped = f", {self.num_skipped} rows skipped" if self.num_skipped else ""
        merged = f", {self.num_duplicates} duplicates merged" if self.num_duplicates else ""
        return f"task_env({self.num_train} tasks to train on, {self.num_eval} held out{merged}{skipped})"


class TaskEnv(ToolEnv):
    """Asks a task's question, answers tool calls, and scores the finished episode."""

    def __init__(
        self,
        split: Split,
        prompt: Prompt,
        parts: Sequence[RewardPart],
        *,
        tools: Sequence[Tool | Callable[..., Any]],
        success: Success,
        answer: str,
        on_malformed: OnMalformed,
    ) -> None:
        super().__init__(tools=tools, on_malformed=on_malformed)
        self._split = split
        self._prompt = prompt
        self._parts = parts
        self._success = success
        self._answer = answer

    def tasks(self, split: SplitName) -> Sequence[Task]:
        return self._split.train if split == "train" else self._split.eval

    def reset(self, task: Task) -> Sequence[Message]:
        return self._prompt.messages(dict(task.data))

    def score(self, answer: str) -> Step:  # noqa: ARG002 (the whole trajectory is judged when the episode has ended)
        return Step(done=True)

    async def judge(self, trajectory: Trajectory, task: Task) -> Score:
        """The weighted sum of the rewards, and whether it was a success."""
        if not self._parts and not callable(self._success):
            return Score(0.0)
        values = {part.name: await self._ask(part, trajectory, task) for part in self._parts}
        total = sum(part.weight * values[part.name] for part in self._parts)
        scored = replace(trajectory, reward=total, reward_parts=values)
        return Score(total, values, await self._succeeds(scored, task))

    async def _ask(self, part: RewardPart, trajectory: Trajectory, task: Task) -> float:
        return part.value(await self._call(part.name, part.function, trajectory, task))

    async def _call(self, name: str, function: Callable[..., Any], trajectory: Trajectory, task: Task) -> Any:
        try:
            return await call_with_timeout(function, trajectory, task, timeout_s=_NO_LIMIT_S)
        except (RewardError, HangingCallsError):
            raise
        except Exception as error:
            raise failure(name, error) from error

    async def _succeeds(self, scored: Trajectory, task: Task) -> bool | None:
        if self._success is None:
            return None
        if isinstance(self._success, str):
            return scored.reward_parts[self._success] >= 1.0
        if not callable(self._success):
            return scored.reward >= self._success
        said = await self._call("success", self._success, scored, task)
        if not isinstance(said, bool):
            raise RewardError(f"success() returns True or False; got {type(said).__name__} {said!r:.100}")
        return said

    def demonstrations(self, count: int, *, seed: int, start: int) -> Sequence[Demonstration]:
        """Right answers to tasks of the train split, drawn with replacement. Raises NoDemonstrationsError if a row has
        none."""
        return [self._demonstrate(seed, start + index) for index in range(count)]

    def _demonstrate(self, seed: int, number: int) -> Demonstration:
        digest = blake2b(f"demonstration/{seed}/{number}".encode(), digest_size=8).digest()
        task = self._split.train[random.Random(int.from_bytes(digest, "big")).randrange(len(self._split.train))]
        if task.data.get(self._answer) is None:
            raise NoDemonstrationsError(
                f"a demonstration needs a right answer, and task {task.id} has no column {self._answer!r} (it has: "
                f"{', '.join(task.data)}); name it with answer=..."
            )
        return Demonstration(task, ((Message("assistant", str(task.data[self._answer]), channel="final"),),))


def _loaded(
    *,
    data: Any,
    reward: Rewards | None,
    prompt: str | PromptFunction | None,
    system: str,
    answer: str,
    success: Success,
    eval_share: float,
    eval_data: Any,
    seed: int,
    columns: Sequence[str] | None,
    on_bad_row: OnBadRow,
    **_used_later: Any,
) -> tuple[Prompt, tuple[RewardPart, ...], Split]:
    """The data read and parted, the prompt and the reward ready."""
    if not 0.0 <= eval_share <= 1.0:
        raise DataError(f"eval_share is a share between 0 and 1; got {eval_share!r}")
    if on_bad_row not in get_args(OnBadRow):
        raise DataError(f"on_bad_row is 'refuse' or 'skip'; got {on_bad_row!r}")
    if isinstance(columns, str):
        raise DataError(f"columns is a list of names; got the text {columns!r}")
    data, eval_data = both_splits(data, eval_data)
    rows = open_rows(data, columns)
    made = Prompt(prompt, system, columns_of(rows))
    parts = _parts(reward, answer, made)
    _check_success(success, parts)
    needed = [answer] if any(_compares(part) for part in parts) else []
    needed += [name for part in parts if isinstance(part.function, TrlReward) for name in part.function.needs]
    if eval_data is None:
        split = split_by_content(rows, made, share=eval_share, seed=seed, needed=needed, on_bad_row=on_bad_row)
    else:
        eval_rows = open_rows(eval_data, columns, name="eval_data")
        split = split_as_given(rows, eval_rows, made, needed=needed, on_bad_row=on_bad_row)
    return made, parts, split


def _functions(*, reward: Any, prompt: Any, success: Any, tools: Sequence[Any], **_others: Any) -> tuple[Any, ...]:
    """The functions among the options, whose source a run keeps."""
    rewards = [item[0] if isinstance(item, tuple) else item for item in as_list(reward)]
    made = [getattr(item, "function", item) for item in tools]
    return tuple(function for function in (prompt, *rewards, success, *made) if callable(function))


def _name_of(data: Any) -> str:
    return re.sub(r"[^\w.-]", "_", Path(data).name) if isinstance(data, str | Path) else "data"


def _parts(reward: Rewards | None, answer: str, prompt: Prompt) -> tuple[RewardPart, ...]:
    if reward is None:
        return ()
    rewards = [_with_answer(item, answer) for item in as_list(reward)]
    return as_parts(rewards, is_text=lambda task: prompt.is_text(dict(task.data)))


def _check_success(success: Success, parts: Sequence[RewardPart]) -> None:
    names = [part.name for part in parts]
    if isinstance(success, str) and success not in names:
        got = f"the rewards are {', '.join(names)}" if names else "there is no reward"
        raise RewardDeclarationError(f"success names the reward {success!r}, but {got}")
    if success is not None and not callable(success) and not isinstance(success, int | float | str):
        raise RewardDeclarationError(f"success is a number, the name of a reward, a function or None; got {success!r}")


def _with_answer(item: Any, answer: str) -> Any:
    """`exact_match` reads the column that holds the answers."""
    if is_weighted(item):
        return (_with_answer(item[0], answer), *item[1:])
    found = resolve(item, "keel.rewards") if isinstance(item, str) else item
    return functools.partial(exact_match, answer_key=answer) if found is exact_match else found


def _compares(part: RewardPart) -> bool:
    return getattr(part.function, "func", None) is exact_match
