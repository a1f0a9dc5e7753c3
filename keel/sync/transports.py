"""Weights as a directory of safetensors: written whole or not at all, checked name by name before a byte is changed.

The names are those of `module.named_parameters()` on both ends (in-memory names, not those of a checkpoint, which may
fuse or split tensors), so nothing is converted on the way and the bits arrive as they left.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from keel.sync.base import SyncError

WEIGHTS_FILE = "weights.safetensors"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (only ever used through mkdtemp)
NAMES_SHOWN = 8
_DTYPE_NAMES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def write_weights(location: str | Path, tensors: Mapping[str, torch.Tensor], *, version: int | None = None) -> Path:
    """Write `tensors` to `location`/weights.safetensors and return that path.

    The file appears by a rename, so a reader sees all of it or none. `version` is kept in the header. A tensor on
    another device is copied to the host. Raises OSError if the place is full or not writable.
    """
    directory = Path(location)
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / WEIGHTS_FILE
    unfinished = directory / f".{WEIGHTS_FILE}.{os.getpid()}"
    host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(_unshared(host), str(unfinished), metadata={"version": json.dumps(version)})
        unfinished.replace(final)
    finally:
        unfinished.unlink(missing_ok=True)
    return final


def read_weights(location: str | Path, into: Mapping[str, torch.Tensor]) -> int | None:
    """Copy the weights at `location` into the tensors of `into`, in place, and return the version in the header.

    Everything is checked first: raises SyncError, naming the tensors, if the file is not there, or a name is missing
    or unexpected, or a shape or type differs. Then nothing has been changed.
    """
    path = Path(location) / WEIGHTS_FILE
    if not path.is_file():
        raise SyncError(f"weights: no {WEIGHTS_FILE} in {location}; the learner must write it before the engine reads")
    with safe_open(str(path), framework="pt", device="cpu") as file:
        _check_names(set(file.keys()), set(into), path)
        _check_shapes(file, into, path)
        with torch.no_grad():
            for name, target in into.items():
                target.copy_(file.get_tensor(name))
        version = json.loads((file.metadata() or {}).get("version", "null"))
    return None if version is None else int(version)


@contextmanager
def weights_directory(parent: str | Path | None = None) -> Iterator[str]:
    """A fresh directory for one transfer, removed afterwards: below `parent`, else the system's temporary directory."""
    directory = tempfile.mkdtemp(prefix=f"keel-weights-{os.getpid()}-", dir=parent)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def transfer_places(first: str | Path | None = None) -> list[str | None]:
    """Where a transfer may be tried, fastest first: `first` alone if given, else shared memory (if there is any), then
    the temporary directory (None)."""
    if first is not None:
        return [str(first)]
    usable = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)
    return [str(SHARED_MEMORY), None] if usable else [None]


def is_full(error: OSError) -> bool:
    """Did a write fail for want of space? (Containers often have only a small shared memory.)"""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied tensors cloned, because safetensors refuses two names for one storage."""
    seen: set[int] = set()
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return result


def _check_names(found: set[str], wanted: set[str], path: Path) -> None:
    problems = []
    if missing := sorted(wanted - found):
        problems.append(f"missing: {_listed(missing)}")
    if unexpected := sorted(found - wanted):
        problems.append(f"unexpected: {_listed(unexpected)}")
    if problems:
        raise SyncError(f"weights in {path}: {'; '.join(problems)}. Learner and engine must hold the same model")


def _check_shapes(file: safe_open, into: Mapping[str, torch.Tensor], path: Path) -> None:
    problems = []
    for name, target in into.items():
        header = file.get_slice(name)  # type: ignore[no-untyped-call]
        shape, dtype = tuple(header.get_shape()), _DTYPE_NAMES.get(str(header.get_dtype()))
        if shape != tuple(target.shape) or dtype != target.dtype:
            problems.append(f"{name} is {dtype} {list(shape)}, the engine's is {target.dtype} {list(target.shape)}")
    if problems:
        raise SyncError(f"weights in {path}: {_listed(problems)}. Learner and engine must hold the same model")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
