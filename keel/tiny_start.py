"""A small random model to start from, with a tokenizer that learned its words from the environment.

The texts are what the agent will really read and write: demonstrations are played through the environment and
rendered by the chat format over a tokenizer of plain bytes, and cut at the special tokens. An environment without
demonstrations has its first prompts and the texts of its tasks to learn from.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from keel import plugins
from keel.chat.base import Chat
from keel.chat.factory import make_chat
from keel.config import TrainConfig, WarmStartConfig
from keel.envs.base import Env, NoDemonstrationsError
from keel.envs.calls import told
from keel.envs.load import EnvFactory, tasks_of
from keel.models.tiny import CHATML_SPECIAL_TOKENS, HARMONY_SPECIAL_TOKENS, build_tiny_model, build_tiny_tokenizer
from keel.rollouts.demonstrate import Demonstrations, DemonstrationSource
from keel.rollouts.loop_thread import run_once
from keel.types import Message, Task, UserFault

NUM_DEMONSTRATIONS = 1000
NUM_TASKS = 1000
Style = Literal["harmony", "chatml"]


class TinyStartError(UserFault, RuntimeError):
    """A small model cannot be made for the run; says what of the environment failed."""


def build_tiny_start(config: TrainConfig, factory: EnvFactory, path: Path) -> None:
    """Write the model and tokenizer of `config.model.tiny` to `path`; the same config writes the same bytes."""
    tiny = config.model.tiny
    assert tiny.preset, "a tiny model needs a preset"
    shutil.rmtree(path, ignore_errors=True)  # half-written by a run that was killed
    style: Style = "harmony" if tiny.preset == "gpt_oss" else "chatml"
    texts = list(texts_to_learn(config, factory, style))
    tokenizer = build_tiny_tokenizer(texts, tiny.vocab_size, style=style, across_words=True)
    build_tiny_model(tiny.preset, path, tokenizer=tokenizer, seed=config.seed, **tiny.options)


def texts_to_learn(config: TrainConfig, factory: EnvFactory, style: Style) -> Iterator[str]:
    """What the tokenizer learns its words from: demonstrations, or, if there are none, tasks.

    Raises NoDemonstrationsError if there are none and the config has a warm start, which needs them, TinyStartError if
    a task cannot be begun.
    """
    special = HARMONY_SPECIAL_TOKENS if style == "harmony" else CHATML_SPECIAL_TOKENS
    cut = re.compile("|".join(map(re.escape, special)))
    plain_bytes = build_tiny_tokenizer([], 256 + len(special), style=style)
    chat = make_chat(config.chat, plain_bytes)
    try:
        rendered = _demonstrated(config, factory, chat)
    except NoDemonstrationsError:
        if config.warm_start.steps:
            raise
        texts, rendered = run_once(_asked(factory, chat))
        yield from texts
    for token_ids in rendered:
        text = plain_bytes.decode(token_ids, skip_special_tokens=False)
        yield from (part for part in cut.split(text) if part)


def named_demonstrations(config: WarmStartConfig) -> Demonstrations | None:
    """The demonstrations that the config names; None: the environment's own."""
    if not config.demonstrations:
        return None
    found: Demonstrations = plugins.resolve(config.demonstrations, "keel.envs")
    return found


def _demonstrated(config: TrainConfig, factory: EnvFactory, chat: Chat) -> list[list[int]]:
    """The tokens of `NUM_DEMONSTRATIONS` demonstrations."""
    own = named_demonstrations(config.warm_start)
    made = DemonstrationSource(factory, chat, per_step=NUM_DEMONSTRATIONS, seed=0, demonstrations=own)
    with contextlib.closing(made) as source:
        groups = source.next_groups(0)
    return [list(segment.token_ids) for group in groups for segment in group.trajectories[0].segments]


async def _begun(env: Env, task: Task) -> Sequence[Message]:
    """The first messages of a task."""
    try:
        messages: Any = env.reset(task)
        return await messages if inspect.isawaitable(messages) else messages  # type: ignore[no-any-return]
    except Exception as error:
        raise TinyStartError(
            f"without demonstrations a small model learns its words from the tasks, and reset() of task {task.id} "
            f"raised {told(error)}"
        ) from error


async def _asked(factory: EnvFactory, chat: Chat) -> tuple[list[str], list[list[int]]]:
    """The texts of the first `NUM_TASKS` tasks' data, and the tokens of their first prompts."""
    env = factory()
    try:
        tasks = tasks_of(env, "train")
        chosen = [tasks[index] for index in range(min(NUM_TASKS, len(tasks)))]
        prompts = []
        for task in chosen:
            prompts.append(list(chat.start(await _begun(env, task), env.tools()).token_ids))  # noqa: PERF401
    finally:
        closed = env.close()
        if inspect.isawaitable(closed):
            await closed
    texts = [value for task in chosen for value in task.data.values() if isinstance(value, str)]
    return texts, prompts
