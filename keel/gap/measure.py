"""`keel.mismatch`: from a log, whoever wrote it, to what it says about the gap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from keel.gap.corrections import correction_effects
from keel.gap.log import ENGINE, LEARNER, GapLog, GapLogError, LoggedSequence
from keel.gap.read import read_any
from keel.gap.report import GapReport
from keel.gap.statistics import gap_statistics, peer_statistics
from keel.gap.worst import Words, worst_tokens

__all__ = ["measure", "mismatch", "route_difference"]

Array = npt.NDArray[Any]
WORST = 20
WHO = {ENGINE: "the engine's", LEARNER: "the learner's"}


def mismatch(
    record: Any,
    *,
    model: str | Path = "",
    dtype: str = "float32",
    temperature: float = 1.0,
    tokenizer: str | Path = "",
    worst: int = WORST,
) -> GapReport:
    """How far apart engine and learner put the tokens of a log, theirs or ours.

    `record` is a path (a run, a step record, a token export of prime-rl, a debug dump of slime or miles, a capture of
    the TRL mixin, arrays in a file), a loaded run or step record, a dict of arrays, or a list of such. Where the
    learner's side is missing, it is recomputed with `model` (a Hugging Face directory or hub id) in `dtype`, at the
    log's temperatures or else `temperature`. Texts are those of `tokenizer`, of `model`, or of the run itself.

    Raises GapLogError for what cannot be read or compared, naming file and field.
    """
    log = read_any(record)
    recomputed = ""
    if log.lacks(LEARNER) and model:
        from keel.gap.recompute import load_model, with_learner

        log = with_learner(log, load_model(model, dtype=dtype), temperature=temperature)
        recomputed = f"{model} in {dtype}"
    elif model:
        log = replace(log, notes=(*log.notes, f"{model} was not used: the log has the learner's log-probs"))
    return measure(log, words=_words(record, model, tokenizer), worst=worst, recomputed=recomputed)


def measure(log: GapLog, *, words: Words | None = None, worst: int = WORST, recomputed: str = "") -> GapReport:
    """The report of a log that was read. Raises GapLogError if there is nothing to compare, saying what to record."""
    log = _comparable(log)
    rollout = _drawn(log, lambda each: each.rollout_logprobs)
    learner = _drawn(log, lambda each: each.learner_logprobs)
    names = list(dict.fromkeys(each.trajectory for each in log.sequences))
    index = {name: place for place, name in enumerate(names)}
    trajectory = np.concatenate([np.full(int(each.drawn.sum()), index[each.trajectory]) for each in log.sequences])
    return GapReport(
        log.kind,
        len(log.sequences),
        len(names),
        {**gap_statistics(rollout, learner), **route_difference(log.sequences)},
        peer_statistics(rollout, learner, trajectory),
        correction_effects(rollout, learner, trajectory),
        worst_tokens(log.sequences, worst, words),
        recomputed,
        log.notes,
    )


def route_difference(sequences: tuple[LoggedSequence, ...]) -> dict[str, float]:
    """`route_diff`, the share of tokens that any layer routed differently; {} where one side's routes are not known."""
    different = known = 0
    for each in sequences:
        if each.routes is None or each.learner_routes is None:
            continue
        if each.routes.shape != each.learner_routes.shape:
            raise GapLogError(
                f"{each.where}: the engine's routes are {each.routes.shape}, the learner's "
                f"{each.learner_routes.shape} (tokens, layers, experts); they are not of one model"
            )
        both = (each.routes >= 0).all(-1) & (each.learner_routes >= 0).all(-1)
        apart = (np.sort(each.routes, -1) != np.sort(each.learner_routes, -1)).any(-1) & both
        known += int(both.any(-1).sum())
        different += int(apart.any(-1).sum())
    return {"route_diff": different / known} if known else {}


def _comparable(log: GapLog) -> GapLog:
    """The log's sequences with drawn tokens and both sides. Raises GapLogError if there are none."""
    drawn = [each for each in log.sequences if each.drawn.any()]
    if not drawn:
        raise GapLogError(
            f"{log.kind}: {len(log.sequences)} sequences, and no token that the policy drew (their masks are empty)"
        )
    whole = tuple(each for each in drawn if each.rollout_logprobs is not None and each.learner_logprobs is not None)
    notes = log.notes
    for side in (ENGINE, LEARNER):
        lacking = [each for each in drawn if getattr(each, side) is None]
        if not lacking:
            continue
        what = f"{len(lacking)} of {len(drawn)} sequences lack {WHO[side]} log-probs"
        if whole:
            notes = (*notes, f"{what} and are left out")
            continue
        instead = " Or give --model DIR: it is recomputed from the tokens." if side == LEARNER else ""
        raise GapLogError(
            f"{lacking[0].where}: {what}, so there is nothing to compare. {log.how_to_record(side)}{instead}"
        )
    return replace(log, sequences=whole, notes=notes)


def _drawn(log: GapLog, side: Callable[[LoggedSequence], Array | None]) -> Array:
    """[T] one side's log-probs of every drawn token."""
    parts = []
    for each in log.sequences:
        stream = side(each)
        assert stream is not None
        parts.append(np.asarray(stream, np.float64)[each.drawn])
    return np.concatenate(parts)


def _words(record: Any, model: str | Path, tokenizer: str | Path) -> Words | None:
    """What spells tokens: the tokenizer named, the model's, or the logged run's; None if none is named or found."""
    from keel.chat.tokenizer import load_tokenizer

    place = tokenizer or _tokenizer_in(Path(model) if model else None) or _own_tokenizer(record)
    if not place:
        return None
    try:
        spell: Words = load_tokenizer(str(place)).decode
    except (OSError, ValueError) as error:
        raise GapLogError(f"{place}: no tokenizer can be loaded from it: {error}") from error
    return spell


def _tokenizer_in(model: Path | None) -> str | Path | None:
    """A model's directory if it has a tokenizer; a hub id as it is."""
    if model is None or (model.is_dir() and not (model / "tokenizer.json").is_file()):
        return None
    return model


def _own_tokenizer(record: Any) -> Path | None:
    """Where a run of Keel, or the run of a step record, keeps a tokenizer; None if it does not."""
    first = record[0] if isinstance(record, (list, tuple)) and record else record
    path = getattr(first, "path", first)
    if not isinstance(path, (str, Path)):
        return None
    root = Path(path) if Path(path).is_dir() else Path(path).parent.parent
    places = [root / "model", *sorted(root.glob("checkpoints/*/weights"), reverse=True), root / "tokenizer"]
    return next((each for each in places if (each / "tokenizer.json").is_file()), None)
