"""A dict of arrays as a log of the gap, from Python or from a .json, .npz, .pt or .safetensors file.

    {"rollout_logprobs": .., "learner_logprobs": ..,      either side; one may be missing, and can then be recomputed
     "token_ids": .., "drawn": .., "temperature": ..,     optional; `drawn` marks what is compared (default: all)
     "cu_seqlens": [0, 12, 30]}                           optional, for flat arrays: where each sequence starts, and T

All are aligned: entry i speaks of token i. Arrays are flat [T], or padded [B, T] (then `drawn` says what is no
padding), or lists of lists of unequal length. NumPy arrays, tensors and lists will do. `loss_mask` and `mask` are other
names for `drawn`, and `ALIASES` has those of the log-probs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from keel.gap.log import ENGINE, LEARNER, GapLog, GapLogError, LoggedSequence, numbers, whole_numbers

KIND = "arrays"
HOW = tuple((side, f"Name it {side!r} in the arrays.") for side in (ENGINE, LEARNER))
ALIASES: dict[str, tuple[str, ...]] = {
    ENGINE: (ENGINE, "rollout_log_probs", "inference_logprobs", "generation_logprobs", "sampling_per_token_logps"),
    LEARNER: (
        LEARNER,
        "old_logprobs",
        "trainer_logprobs",
        "old_log_probs",
        "prev_logprobs",
        "log_probs",
        "old_per_token_logps",
    ),
    "drawn": ("drawn", "loss_mask", "mask", "response_mask"),
    "token_ids": ("token_ids", "responses"),
    "temperature": ("temperature",),
    "cu_seqlens": ("cu_seqlens",),
}
"""What each array may be called: our own name, then those of prime-rl, verl, NeMo-RL, slime and TRL."""


def read(path: Path) -> GapLog:
    """The arrays in a file, by its suffix. Raises GapLogError."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays: Any = {name: file[name] for name in file.files}
        elif path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="np") as tensors:
                arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (it is no mapping)
        else:
            arrays = json.loads(path.read_bytes())
    except Exception as error:  # (each library has its own for a torn file)
        raise GapLogError(f"{path}: cannot be read as arrays, it may be torn: {str(error)[:300]}") from error
    return read_arrays(arrays, of=str(path))


def has_a_side(value: Any) -> bool:
    """Whether a value is a mapping with the log-probs of either side, under any of their names."""
    return isinstance(value, Mapping) and any(name in value for side in (ENGINE, LEARNER) for name in ALIASES[side])


def read_arrays(arrays: Any, *, of: str = "the arrays") -> GapLog:
    """A dict of arrays; see the module. `of` names them in messages. Raises GapLogError."""
    if not isinstance(arrays, Mapping):
        raise GapLogError(f"{of}: got {type(arrays).__name__}; give a dict of arrays with {ENGINE} and {LEARNER}")
    found = {name: _find(arrays, name, of) for name in ALIASES}
    aligned = {name: value for name, value in found.items() if value is not None and name != "cu_seqlens"}
    if ENGINE not in aligned and LEARNER not in aligned:
        raise GapLogError(
            f"{of}: has neither {ENGINE} nor {LEARNER} (nor another name for them); "
            f"it has {', '.join(sorted(map(str, arrays))[:20]) or 'nothing'}"
        )
    rows = {name: _rows(value, found["cu_seqlens"], name=name, of=of) for name, value in aligned.items()}
    counts = {name: len(value) for name, value in rows.items()}
    if len(set(counts.values())) != 1:
        raise GapLogError(f"{of}: numbers of sequences differ: {counts}")
    sequences = [
        _sequence({name: value[index] for name, value in rows.items()}, f"{of}, sequence {index}")
        for index in range(next(iter(counts.values())))
    ]
    return GapLog(KIND, tuple(sequences), HOW)


def _find(arrays: Mapping[Any, Any], name: str, of: str) -> Any:
    given = [alias for alias in ALIASES[name] if alias in arrays]
    if len(given) > 1:
        raise GapLogError(f"{of}: {' and '.join(given)} both mean {name}; leave one")
    return arrays[given[0]] if given else None


def _rows(value: Any, bounds: Any, *, name: str, of: str) -> list[Any]:
    """One entry a sequence: cut at `bounds`, rows of what has two dimensions, or the whole as one sequence."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy() if value.dtype.is_floating_point else value.cpu().numpy()
    nested = value.ndim == 2 if isinstance(value, np.ndarray) else bool(len(value)) and hasattr(value[0], "__len__")
    if bounds is None:
        return list(value) if nested else [value]
    if nested:
        raise GapLogError(f"{of}: {name} has two dimensions, and cu_seqlens bounds flat arrays; give one or the other")
    starts = whole_numbers(bounds, name="cu_seqlens", of=of)
    if len(starts) < 1 or starts[0] != 0 or starts[-1] != len(value) or np.any(np.diff(starts) < 0):
        raise GapLogError(f"{of}: cu_seqlens {starts.tolist()[:8]} does not cover the {len(value)} entries of {name}")
    return [value[start:stop] for start, stop in pairwise(starts.tolist())]


def _sequence(streams: Mapping[str, Any], where: str) -> LoggedSequence:
    sides = {name: numbers(streams[name], name=name, of=where) for name in (ENGINE, LEARNER) if name in streams}
    length = len(next(iter(sides.values())))
    token_ids, drawn, temperature = (streams.get(name) for name in ("token_ids", "drawn", "temperature"))
    ids = np.full(length, -1) if token_ids is None else whole_numbers(token_ids, name="token_ids", of=where)
    every = np.ones(len(ids), dtype=bool)
    return LoggedSequence(
        where,
        where,
        ids,
        every if drawn is None else whole_numbers(drawn, name="drawn", of=where) != 0,
        sides.get(ENGINE),
        sides.get(LEARNER),
        None if temperature is None else numbers(temperature, name="temperature", of=where),
    )
