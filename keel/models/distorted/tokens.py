"""Faults of what a model is shown: tokens left out, brought in, or told in other tokens of the same text.

A sequence is cut into pieces, one per token: the tokens that stand in its place. None, one or two; whatever is said of
the pieces is brought back to the token they stand for.
"""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from keel.distortion import Distortion, DistortionError

TOKEN_CAUSES = ("wrong_template", "retokenized_turns", "lost_stop_token", "wrong_padding")
Splits = Mapping[int, tuple[int, int]]


@dataclass(frozen=True)
class Reply:
    """Drawn tokens `start` to `stop - 1` of a sequence."""

    start: int
    stop: int


@dataclass(frozen=True)
class Shown:
    """What a model is shown of a sequence. `owners[i]` is the token that `tokens[i]` stands for, -1 for none."""

    tokens: tuple[int, ...]
    owners: tuple[int, ...]


def shown(
    token_ids: Sequence[int],
    replies: Sequence[Reply],
    distortions: Sequence[Distortion],
    *,
    splits: Splits,
    pad_token_id: int,
    without_stops: bool = False,
) -> Shown:
    """`token_ids` as the faulty stack reads them.

    Only replies that something follows are tokenized again. `without_stops` leaves the last token of replies out (an
    engine has lost them already when the next turn comes).
    """
    pieces: list[tuple[int, ...]] = [(token,) for token in token_ids]
    first = min((reply.start for reply in replies), default=len(token_ids))
    padding = 0
    for each in (each for each in distortions if each.acts):
        if each.cause == "wrong_template":
            for index in range(min(int(each.strength), first - 1)):
                pieces[index] = ()
        elif each.cause == "wrong_padding" and each.group != "positions":
            padding += int(each.strength)
        elif each.cause == "retokenized_turns":
            for reply in replies:
                if reply.stop < len(token_ids):
                    _split(pieces, reply, each, splits)
        elif each.cause == "lost_stop_token" and without_stops:
            for reply in replies:
                if drawn_for(each, token_ids[reply.start : reply.stop]):
                    pieces[reply.stop - 1] = ()
    return _joined(pieces, padding, pad_token_id)


def drawn_for(distortion: Distortion, reply: Sequence[int]) -> bool:
    """Whether a reply is among the share that `distortion` is planted in; its tokens decide."""
    return _uniform(distortion, zlib.crc32(array("q", reply).tobytes())) < distortion.strength


def shift(values: Sequence[float], places: int) -> list[float]:
    """`values` standing `places` later; what moves in at an end is the value that was there."""
    last = len(values) - 1
    return [values[min(max(index - places, 0), last)] for index in range(len(values))]


def load_splits(directory: str | Path) -> Splits:
    """For each token that can be told in two tokens of the same text, those two, by the tokenizer in `directory`.

    Raises DistortionError if there is no tokenizer.json.
    """
    from tokenizers import Tokenizer

    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise DistortionError(f"retokenized_turns: no tokenizer.json in {directory}; save the tokenizer with the model")
    vocabulary: dict[str, int] = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=False)
    found: dict[int, tuple[int, int]] = {}
    for text, token in vocabulary.items():
        for cut in range(1, len(text)):
            if text[:cut] in vocabulary and text[cut:] in vocabulary:
                found[token] = (vocabulary[text[:cut]], vocabulary[text[cut:]])
                break
    return found


def _uniform(distortion: Distortion, what: int) -> float:
    return random.Random(f"{distortion.cause}/{distortion.seed}/{what}").random()


def _split(pieces: list[tuple[int, ...]], reply: Reply, distortion: Distortion, splits: Splits) -> None:
    for index in range(reply.start, reply.stop):
        (token,) = pieces[index] if len(pieces[index]) == 1 else (-1,)
        if token in splits and _uniform(distortion, (index << 32) + token) < distortion.strength:
            pieces[index] = splits[token]


def _joined(pieces: Sequence[tuple[int, ...]], padding: int, pad_token_id: int) -> Shown:
    tokens, owners = [pad_token_id] * padding, [-1] * padding
    for index, piece in enumerate(pieces):
        tokens += piece
        owners += [index] * len(piece)
    return Shown(tuple(tokens), tuple(owners))
