"""Out of memory, in words: in which phase, with how many tokens, and which option to turn."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from keel.config import TrainConfig
from keel.monitor.progress import WORDS, Phase, Progress
from keel.types import Fault

_SIGNS = re.compile(
    r"can(?:no|')?t allocate memory|not enough memory|out of memory|cannot allocate memory|bad_alloc|MemoryError",
    re.IGNORECASE,
)
_ASKED = re.compile(r"allocate (?:(\d+) bytes|([\d.]+ [KMGT]iB))")

_LEARNING = (
    "model.gradient_checkpointing",
    "batch.max_tokens",
    "model.head_chunk_tokens",
    "learner.ranks",
)
_SAMPLING = ("engine.slots", "rollout.max_sequence_tokens", "rollout.concurrency")
_WHOLE = ("model.dtype", "model.path", "learner.ranks")
KNOBS: Mapping[Phase, Sequence[str]] = {
    "load": _WHOLE,
    "evaluate": _SAMPLING,
    "collect": _SAMPLING,
    "pack": ("rollout.groups_per_step", "rollout.max_sequence_tokens"),
    "score": ("batch.max_tokens", "model.head_chunk_tokens", "learner.ranks"),
    "backward": _LEARNING,
    "optimizer": ("model.lora.rank", *_WHOLE),
    "publish": ("engine.process", *_WHOLE),
    "record": ("record.every", "rollout.groups_per_step"),
    "save": _WHOLE,
}
"""Options that decide how much a phase takes, the most useful first."""
_HOW = {
    "model.gradient_checkpointing": "true",
    "batch.max_tokens": "lower",
    "model.head_chunk_tokens": "lower",
    "model.lora.rank": "above 0 trains an adapter: no moments and no copy of the whole weights",
    "engine.slots": "lower",
    "engine.process": '"same" samples from the learner\'s own weights',
    "rollout.max_sequence_tokens": "lower",
    "rollout.concurrency": "lower",
    "rollout.groups_per_step": "lower",
    "record.every": "higher, or 0",
    "learner.ranks": "higher: each holds a part of the model",
    "model.dtype": '"bfloat16"',
    "model.path": "a smaller model",
}


class MemoryExhaustedError(Fault, RuntimeError):
    """There was not enough memory; the text names the phase, the tokens and the options to turn."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says so: Python's, torch's on a card or on the CPU, or one told by another process."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(_SIGNS.search(str(error)))


@contextmanager
def told_if_exhausted(config: TrainConfig, progress: Progress) -> Iterator[None]:
    """An error that means too little memory comes out as MemoryExhaustedError; every other as it is."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryExhaustedError) or not is_out_of_memory(error):
            raise
        raise MemoryExhaustedError(describe(error, config, progress)) from error


def describe(error: BaseException, config: TrainConfig, progress: Progress) -> str:
    """ "out of memory while computing the gradient at reinforcement step 13 of 40: ... To need less: ..."."""
    sizes = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in progress.sizes.items())
    asked = _ASKED.search(str(error))
    amount = f"; {asked[2] or f'{int(asked[1]) / 2**20:,.1f} MiB'} more could not be had" if asked else ""
    knobs = "; ".join(
        f"{name} {_HOW[name]} (is {value!r})" for name in KNOBS[progress.phase] if (value := _value(config, name)) != ""
    )
    return (
        f"out of memory while {WORDS[progress.phase]} at {progress.where()}"
        f"{f' ({sizes})' if sizes else ''}{amount}. To need less, the most useful first: {knobs}. "
        "Checkpoints written before are whole"
    )


def _value(config: TrainConfig, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
