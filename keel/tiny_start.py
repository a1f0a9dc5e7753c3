"""A small random model to start from, with a tokenizer that learned its words from the environment's demonstrations.

The texts are what the agent will really read and write: demonstrations are played through the environment and
rendered by the chat format over a tokenizer of plain bytes, and cut at the special tokens.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from keel import plugins
from keel.chat.factory import make_chat
from keel.config import TrainConfig, WarmStartConfig
from keel.envs.load import EnvFactory
from keel.models.tiny import CHATML_SPECIAL_TOKENS, HARMONY_SPECIAL_TOKENS, build_tiny_model, build_tiny_tokenizer
from keel.rollouts.demonstrate import Demonstrations, DemonstrationSource

NUM_DEMONSTRATIONS = 1000


def build_tiny_start(config: TrainConfig, factory: EnvFactory, path: Path) -> None:
    """Write the model and tokenizer of `config.model.tiny` to `path`; the same config writes the same bytes."""
    tiny = config.model.tiny
    assert tiny.preset, "a tiny model needs a preset"
    shutil.rmtree(path, ignore_errors=True)  # half-written by a run that was killed
    style: Literal["harmony", "chatml"] = "harmony" if tiny.preset == "gpt_oss" else "chatml"
    texts = list(demonstration_texts(config, factory, style))
    tokenizer = build_tiny_tokenizer(texts, tiny.vocab_size, style=style, across_words=True)
    build_tiny_model(tiny.preset, path, tokenizer=tokenizer, seed=config.seed, **tiny.options)


def named_demonstrations(config: WarmStartConfig) -> Demonstrations | None:
    """The demonstrations that the config names; None: the environment's own."""
    if not config.demonstrations:
        return None
    found: Demonstrations = plugins.resolve(config.demonstrations, "keel.envs")
    return found


def demonstration_texts(config: TrainConfig, factory: EnvFactory, style: Literal["harmony", "chatml"]) -> Iterator[str]:
    """The ordinary text between the special tokens of `NUM_DEMONSTRATIONS` demonstrations."""
    special = HARMONY_SPECIAL_TOKENS if style == "harmony" else CHATML_SPECIAL_TOKENS
    cut = re.compile("|".join(map(re.escape, special)))
    plain_bytes = build_tiny_tokenizer([], 256 + len(special), style=style)
    chat, own = make_chat(config.chat, plain_bytes), named_demonstrations(config.warm_start)
    made = DemonstrationSource(factory, chat, per_step=NUM_DEMONSTRATIONS, seed=0, demonstrations=own)
    with contextlib.closing(made) as source:
        groups = source.next_groups(0)
    for group in groups:
        for segment in group.trajectories[0].segments:
            text = plain_bytes.decode(list(segment.token_ids), skip_special_tokens=False)
            yield from (part for part in cut.split(text) if part)
