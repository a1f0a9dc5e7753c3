"""Debug dumps of slime and miles: `--save-debug-rollout-data`, `--save-debug-train-data`, `--dump-details`.

Read from slime at 624b824 (slime/observability/rollout_data_utils.py, train_data_utils.py, slime/utils/types.py) and
miles at 31f1ca9 (miles/ray/rollout/debug_data.py, miles/utils/train_dump_utils.py, miles/utils/types.py):

    rollout dump, both          {"rollout_id", "samples": [Sample.to_dict(), ..]}        engine's side alone
    train dump, slime           {"format_version": 2, "rollout_id", "samples": [{..}, ..], "dp_shards": ..}
    train dump, miles, a rank   {"rollout_id", "rank", "rollout_data": {column: [one a sample, ..]}, "cp_size", ..}

Per sample: `tokens`, prompt included; `response_length` (`response_lengths` in train dumps); and, about its last so
many tokens, `loss_mask` (`loss_masks`; absent: all ones), `rollout_log_probs` of the engine, `log_probs` of the
trainer. miles leaves a file for each rank: those of tensor-parallel ranks hold the same samples, of which one is kept,
and those of pipeline stages before the last lack `log_probs`.

The files are torch's pickles. They are read without running anything: only tensors, numpy arrays and plain values are
let through, and a file that needs more is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keel.gap import arrays
from keel.gap.log import ENGINE, LEARNER, GapLog, GapLogError, LoggedSequence, placed, whole_numbers

KIND = "slime or miles debug dump"
HOW = (
    (
        LEARNER,
        (
            "A rollout dump has the engine's side alone: record --save-debug-train-data (or --dump-details) and give "
            "those files; a train dump has `log_probs` where the trainer scored the batch, on the last pipeline stage."
        ),
    ),
    (ENGINE, "`rollout_log_probs` are there if the rollout asked the engine for log-probs (return_logprob)."),
)


_COLUMNS = (
    "tokens",
    "response_lengths",
    "loss_masks",
    "rollout_log_probs",
    "log_probs",
    "sample_indices",
    "rollout_ids",
)


def read(path: Path) -> GapLog:
    """The dump, or else the arrays, in a .pt file. Raises GapLogError for one that is torn or would run code."""
    value = load_without_code(path)
    if not isinstance(value, Mapping) or not ({"samples", "rollout_data"} & value.keys()):
        if arrays.has_a_side(value):
            return arrays.read_arrays(value, of=str(path))
        raise GapLogError(
            f"{path}: not a dump of slime or miles (neither `samples` nor `rollout_data` in it), and no arrays; "
            "give a file of --save-debug-rollout-data or --save-debug-train-data"
        )
    if "rollout_data" in value:
        samples = _samples_of_rank(value, path)
    else:
        version = value.get("format_version")
        if version not in (None, 2):
            raise GapLogError(f"{path}: format_version is {version!r}; this Keel reads 2, and dumps without one")
        samples = value["samples"]
    if not isinstance(samples, list):
        raise GapLogError(f"{path}: samples is {type(samples).__name__}, not a list")
    step = value.get("rollout_id")
    found = [_sequence(sample, f"{path}, sample {index}", step) for index, sample in enumerate(samples)]
    return GapLog(KIND, tuple(sequence for sequence in found if sequence is not None), HOW)


def once_each(log: GapLog) -> GapLog:
    """The log with each sample once: of several with the same tokens under the same id, the one that lacks least."""
    best: dict[tuple[str | int, bytes], LoggedSequence] = {}
    for place, sequence in enumerate(log.sequences):
        key = (sequence.identity or place, sequence.token_ids.tobytes())
        if key not in best or _sides(sequence) > _sides(best[key]):
            best[key] = sequence
    return GapLog(log.kind, tuple(best.values()), log.missing, log.notes)


def load_without_code(path: Path) -> Any:
    """What `torch.save` wrote to a file, on the CPU. Raises GapLogError if it cannot be read without running code."""
    import pickle

    import torch
    from numpy._core import multiarray

    numpy_types = [type(np.dtype(each)) for each in (*np.typecodes["AllInteger"], *np.typecodes["Float"], "?")]
    makers: dict[str, Any] = {name: getattr(multiarray, name) for name in ("_reconstruct", "scalar")}
    older: list[Any] = [
        (maker, f"numpy.core.multiarray.{name}") for name, maker in makers.items()
    ]  # as NumPy 1 called them
    try:
        with torch.serialization.safe_globals([*makers.values(), *older, np.ndarray, np.dtype, *numpy_types]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise GapLogError(f"{path}: torn, or not a file of torch's") from error
        raise GapLogError(
            f"{path}: is not read, for that would run code that the file names ({named[1]}); write it anew with plain "
            "values, arrays and tensors alone (objects in a sample's `metadata` are the usual cause)"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise GapLogError(f"{path}: torn, or not a file of torch's: {str(error)[:300]}") from error


def _samples_of_rank(value: Mapping[str, Any], path: Path) -> list[Any]:
    """miles' columns of one rank as rows."""
    columns = value["rollout_data"]
    if not isinstance(columns, Mapping) or not {"tokens", "response_lengths"} <= columns.keys():
        raise GapLogError(f"{path}: rollout_data has no tokens and response_lengths; not a train dump of miles")
    parts = value.get("cp_size", 1)
    if parts not in (None, 1):
        raise GapLogError(
            f"{path}: cp_size is {parts}: this rank holds a part of every sequence only; record with a "
            "context-parallel size of 1"
        )
    count = len(columns["tokens"])
    rows = []
    for index in range(count):
        row: dict[str, Any] = {}
        for name in _COLUMNS:
            if columns.get(name) is not None:
                if len(columns[name]) != count:
                    raise GapLogError(f"{path}: {name} has {len(columns[name])} entries for {count} samples")
                row[name] = columns[name][index]
        rows.append(row)
    return rows


def _sequence(sample: Any, where: str, step: Any) -> LoggedSequence | None:
    """One sample; None for one that was given up before it had tokens."""
    if not isinstance(sample, Mapping):
        raise GapLogError(f"{where}: is {type(sample).__name__}, not a sample")
    if "tokens" not in sample:
        raise GapLogError(f"{where}: has no tokens; it has {', '.join(sorted(map(str, sample))[:12])}")
    token_ids = whole_numbers(sample["tokens"], name="tokens", of=where)
    length = _first(sample, "response_length", "response_lengths")
    if length is None:
        raise GapLogError(f"{where}: has no response_length, which says where the prompt ends")
    length = int(length)
    if not 0 <= length <= len(token_ids):
        raise GapLogError(f"{where}: response_length is {length} of {len(token_ids)} tokens")
    if not len(token_ids):
        return None
    response = np.arange(len(token_ids)) >= len(token_ids) - length
    mask = _first(sample, "loss_mask", "loss_masks")
    drawn = response if mask is None else placed(mask, response, name="loss_mask", of=where) != 0
    if sample.get("remove_sample"):
        drawn = np.zeros_like(drawn)

    def side(name: str) -> np.ndarray | None:
        values = sample.get(name)
        return None if values is None else placed(values, response, name=name, of=where)

    number = _first(sample, "sample_index", "sample_indices", "index")
    rollout = _first(sample, "rollout_ids", "rollout_id")
    return LoggedSequence(
        where,
        where if rollout is None else f"rollout {step}/{rollout}",
        token_ids,
        drawn,
        side("rollout_log_probs"),
        side("log_probs"),
        identity="" if number is None else f"{step}/{number}",
    )


def _first(sample: Mapping[str, Any], *names: str) -> Any:
    return next((sample[name] for name in names if sample.get(name) is not None), None)


def _sides(sequence: LoggedSequence) -> int:
    return (sequence.rollout_logprobs is not None) + (sequence.learner_logprobs is not None)
