"""Tasks and scores of the library reasoning-gym: any of its data sets, or a mixture, judged by its own scorers.

A task is identified by its question alone: equal questions are one task, and a hash of the question decides whether
it is for training or held out, so no change of seed, size or mixture can move a task between the splits.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from hashlib import blake2b
from types import MappingProxyType
from typing import Any

from keel.chat.base import Reply
from keel.envs.base import Env, EnvError, Split, Step
from keel.types import Message, Task

_ONE_DATASET: Mapping[str, Mapping[str, Any]] = MappingProxyType({"chain_sum": MappingProxyType({})})


class ReasoningGymTasks:
    """The tasks of some data sets, split and scored; shared by all environments of the same options.

    `datasets` maps a data set's name to its options (its config's fields; `size` overrides the general one). To use a
    data set twice, label the entries freely and give each the option `name`. Raises ValueError for names and options
    that reasoning-gym does not know.
    """

    def __init__(self, datasets: Mapping[str, Mapping[str, Any]], *, size: int, seed: int, eval_share: float) -> None:
        if not datasets:
            raise ValueError("reasoning_gym: got no data set; name at least one, e.g. datasets = { chain_sum = {} }")
        if not 0.0 <= eval_share <= 1.0:
            raise ValueError(f"reasoning_gym: eval_share is a share between 0 and 1; got {eval_share}")
        self._eval_share = eval_share
        self._datasets = {label: _create(label, options, size, seed) for label, options in datasets.items()}
        self._entry = functools.lru_cache(maxsize=4096)(self._generate)

    @functools.cached_property
    def _splits(self) -> dict[str, tuple[Task, ...]]:
        tasks: dict[str, Task] = {}
        for label, dataset in self._datasets.items():
            for index in range(len(dataset)):
                entry = dataset[index]
                task = _task(label, index, entry)
                tasks.setdefault(task.id, task)
        ordered = [tasks[key] for key in sorted(tasks)]  # by content hash: a mixture in an order free of any seed
        held_out = [_held_out(task.data["question"], self._eval_share) for task in ordered]
        return {
            "train": tuple(task for task, out in zip(ordered, held_out, strict=True) if not out),
            "eval": tuple(task for task, out in zip(ordered, held_out, strict=True) if out),
        }

    def tasks(self, split: Split) -> tuple[Task, ...]:
        """All tasks of a split, in the order of their content hashes."""
        return self._splits[split]

    def entry(self, task: Task) -> Mapping[str, Any]:
        """The library's own entry behind `task`: question, answer, metadata.

        Raises EnvError if these data sets do not hold it, or hold another question in its place.
        """
        label, index = task.data.get("dataset"), task.data.get("index")
        if label not in self._datasets or not isinstance(index, int):
            raise EnvError(f"reasoning_gym: task {task.id} is of data set {label!r}; here are {list(self._datasets)}")
        entry = self._entry(label, index)
        if entry["question"] != task.data["question"]:
            raise EnvError(
                f"reasoning_gym: entry {index} of {label} is not the question of task {task.id}; the task was made "
                "with another seed, other options or another version of reasoning-gym: use the ones of its run"
            )
        return entry

    def score(self, task: Task, answer: str) -> float:
        """What the library's scorer says of `answer`, 0 to 1."""
        entry = dict(self.entry(task))
        return float(self._datasets[task.data["dataset"]].score_answer(answer, entry))

    def _generate(self, label: str, index: int) -> Mapping[str, Any]:
        entry: Mapping[str, Any] = self._datasets[label][index]
        return entry


class ReasoningGymEnv(Env):
    """One question, one answer, the library's score as the reward; success is a full score.

    A malformed reply, or one that is not a final answer, ends the episode with reward 0.
    """

    def __init__(
        self,
        *,
        datasets: Mapping[str, Mapping[str, Any]] = _ONE_DATASET,
        size: int = 2000,
        seed: int = 0,
        eval_share: float = 0.2,
        instructions: str = "",
    ) -> None:
        self._source = reasoning_gym_tasks(datasets, size=size, seed=seed, eval_share=eval_share)
        self._instructions = instructions
        self._task: Task | None = None

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._source.tasks(split)

    def reset(self, task: Task) -> Sequence[Message]:
        self._task = task
        return first_messages(self._instructions, str(self._source.entry(task)["question"]))

    def step(self, reply: Reply) -> Step:
        if self._task is None:
            raise EnvError("step() before reset()")
        if reply.final is None:
            return Step(done=True, reward=0.0, success=False)
        score = self._source.score(self._task, reply.final)
        return Step(done=True, reward=score, success=score >= 1.0)


def reasoning_gym_tasks(
    datasets: Mapping[str, Mapping[str, Any]], *, size: int, seed: int, eval_share: float
) -> ReasoningGymTasks:
    """The one `ReasoningGymTasks` of these options in this process: environments are many, their tasks the same."""
    plain = {label: dict(options) for label, options in datasets.items()}
    return _shared_tasks(json.dumps(plain), size, seed, eval_share)


def first_messages(instructions: str, question: str) -> tuple[Message, ...]:
    """A developer message with `instructions` (none if empty) and the question."""
    developer = (Message("developer", instructions),) if instructions else ()
    return (*developer, Message("user", question))


@functools.lru_cache(maxsize=8)
def _shared_tasks(datasets_json: str, size: int, seed: int, eval_share: float) -> ReasoningGymTasks:
    return ReasoningGymTasks(json.loads(datasets_json), size=size, seed=seed, eval_share=eval_share)


def _create(label: str, options: Mapping[str, Any], size: int, seed: int) -> Any:
    import reasoning_gym  # here, not above: it takes seconds that a program which only reads the config need not wait
    from reasoning_gym.factory import DATASETS

    values = {"size": size, **options}
    name = values.pop("name", label)
    if name not in DATASETS:
        near = get_close_matches(str(name), DATASETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {len(DATASETS)}, among them chain_sum and products"
        raise ValueError(f"reasoning_gym: there is no data set {name!r}; {hint}")
    # Entry i of a data set is drawn with seed + i, so nearby seeds would give nearly the same tasks: hash the seed.
    values.setdefault("seed", int.from_bytes(blake2b(f"{seed}/{label}".encode(), digest_size=4).digest(), "big"))
    try:
        return reasoning_gym.create_dataset(name, **values)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning_gym: data set {name!r} refuses the options {values}: {error}") from error


def _task(label: str, index: int, entry: Mapping[str, Any]) -> Task:
    question, answer = entry["question"], entry["answer"]
    digest = blake2b(question.encode(), digest_size=8, person=b"keel-task").hexdigest()
    data = {"dataset": label, "index": index, "question": question, "answer": None if answer is None else str(answer)}
    return Task(digest, data)


def _held_out(question: str, eval_share: float) -> bool:
    """Is the task held out? Decided by a hash of its content alone, independent of the hash that orders tasks."""
    digest = blake2b(question.encode(), digest_size=8, person=b"keel-split").digest()
    return int.from_bytes(digest, "big") < eval_share * 2**64
