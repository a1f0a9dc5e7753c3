"""Which reader a log is for: told by what is in it, never guessed from a name alone. Refused in words if it is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keel.gap import arrays, keel_records, prime_rl, slime
from keel.gap.log import GapLog, GapLogError, joined
from keel.step_record import StepRecord

__all__ = ["read_any"]

READABLE = (
    "a run of Keel or one of its steps/*.safetensors; a token export of prime-rl (rank_*.jsonl, or the directory of "
    "them); a debug dump of slime or miles (*.pt, or the directory of them); a capture of the TRL mixin; or arrays "
    "(.json, .npz, .pt, .safetensors) named rollout_logprobs and learner_logprobs"
)
_ARRAYS = (".json", ".npz")


def read_any(record: Any) -> GapLog:
    """The log in `record`: a path, a loaded `StepRecord` or run, a dict of arrays, or several of them in a list.

    Raises GapLogError for what cannot be read, naming file and field.
    """
    if isinstance(record, GapLog):
        return record
    if isinstance(record, StepRecord):
        return keel_records.read_record(record)
    if isinstance(record, Mapping):
        return arrays.read_arrays(record)
    if isinstance(record, (list, tuple)):
        if not record:
            raise GapLogError(f"no log was given; give {READABLE}")
        return slime.once_each(joined([read_any(each) for each in record]))
    path = getattr(record, "path", record)  # a loaded run has one
    if not isinstance(path, (str, Path)):
        raise GapLogError(f"cannot read {type(record).__name__} as a log; give {READABLE}")
    return read_path(Path(path))


def read_path(path: Path) -> GapLog:
    """The log in a file or a directory. Raises GapLogError."""
    if path.is_dir():
        return _directory(path)
    if not path.is_file():
        raise GapLogError(f"{path}: no such file or directory; give {READABLE}")
    if path.stat().st_size == 0:
        raise GapLogError(f"{path}: is empty")
    if path.suffix == ".jsonl":
        return prime_rl.read(path)
    if path.suffix == ".pt":
        return slime.read(path)
    if path.suffix == ".safetensors":
        return keel_records.read_record_file(path) if _is_step_record(path) else arrays.read(path)
    if path.suffix in _ARRAYS:
        return arrays.read(path)
    raise GapLogError(f"{path}: not a log of the gap that Keel reads; give {READABLE}")


def _directory(path: Path) -> GapLog:
    if (path / "config.toml").is_file() and (path / "steps").is_dir():
        return keel_records.read_run(path)
    exports = sorted(path.rglob("rank_*.jsonl"))
    if exports:
        return joined([prime_rl.read(file) for file in exports])
    # Dumps of evaluations are no training data: nobody scored them.
    dumps = sorted(file for file in path.rglob("*.pt") if not file.name.startswith("eval_"))
    if dumps:
        return slime.once_each(joined([slime.read(file) for file in dumps]))
    files = sorted(file for file in path.iterdir() if file.suffix in (*_ARRAYS, ".safetensors"))
    if files:
        return joined([read_path(file) for file in files])
    raise GapLogError(f"{path}: no log of the gap in this directory; give {READABLE}")


def _is_step_record(path: Path) -> bool:
    """Whether a safetensors file has a step record's header; a torn one is left to the reader of arrays to tell of."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
    except Exception:  # noqa: BLE001 (the library's own error for a torn file; told of by the reader)
        return False
    try:
        return isinstance(json.loads(header.get("step", "null")), int)
    except ValueError:
        return False
