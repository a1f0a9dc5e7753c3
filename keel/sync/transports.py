"""Weights as a directory of safetensors, or as a broadcast: whole or not at all, checked name by name before a byte is
changed.

The names are those of `module.named_parameters()` on both ends (in-memory names, not those of a checkpoint, which may
fuse or split tensors), so nothing is converted on the way and the bits arrive as they left.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from keel.sync.base import SyncError
from keel.sync.vllm_worker import channel

WEIGHTS_FILE = "weights.safetensors"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (only ever used through mkdtemp)
TRANSFER, KEPT = "keel-weights-", "keel-vllm-weights-"
"""How directories begin that hold weights on their way, and those that a server would need again; then comes whose."""
NAMES_SHOWN = 8
TIMEOUT_S = 300.0
"""How long one end of a broadcast waits for the other."""
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


def write_weights(
    location: str | Path, tensors: Mapping[str, torch.Tensor], *, version: int | None = None, **header: Any
) -> Path:
    """Write `tensors` to `location`/weights.safetensors and return that path.

    The file appears by a rename, so a reader sees all of it or none. `version` is kept in the header, and so are
    further JSON values. A tensor on another device is copied to the host. Raises OSError if the place is full or not
    writable.
    """
    directory = Path(location)
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / WEIGHTS_FILE
    unfinished = directory / f".{WEIGHTS_FILE}.{os.getpid()}"
    host = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(_unshared(host), str(unfinished), metadata=_as_texts({**header, "version": version}))
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
        headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {
            name: (_DTYPE_NAMES.get(str(header.get_dtype())), tuple(header.get_shape()))
            for name, header in headers.items()
        }
        _check_fit(found, into, f"weights in {path}")
        with torch.no_grad():
            for name, target in into.items():
                target.copy_(file.get_tensor(name))
        version = json.loads((file.metadata() or {}).get("version", "null"))
    return None if version is None else int(version)


def send_weights(
    location: str, tensors: Mapping[str, torch.Tensor], *, version: int, timeout_s: float, **header: Any
) -> None:
    """Broadcast `tensors` from this process to those who receive at `location` (a `channel.Address` as text).

    Raises SyncError if a receiver refuses them, or is not there or lost after `timeout_s`.
    """
    address = channel.Address.from_text(location)
    try:
        channel.send(address, tensors, {**header, "version": version}, timeout_s)
    except RuntimeError as error:  # torch's own for a store or a group that fails, and a refusal
        raise SyncError(f"weights by {address.backend}: {error}") from error


def receive_weights(
    location: str, into: Mapping[str, torch.Tensor], *, timeout_s: float, rank: int = 1
) -> dict[str, torch.Tensor]:
    """What is broadcast at `location`, for the tensors of `into`: received whole, nothing of `into` changed yet.

    Raises SyncError, naming the tensors, if they do not fit (the sender is told), or if the sender is lost.
    """
    address = channel.Address.from_text(location)
    try:
        receiver = channel.Receiver(address, rank, timeout_s)
        try:
            _check_fit(receiver.tensors, into, f"weights by {address.backend}")
        except SyncError as error:
            receiver.refuse(str(error))
            raise
        return receiver.receive()
    except RuntimeError as error:
        if isinstance(error, SyncError):
            raise
        raise SyncError(f"weights by {address.backend}: {error}") from error


@contextlib.contextmanager
def weights_directory(parent: str | Path | None = None) -> Iterator[str]:
    """A fresh directory for one transfer, removed afterwards: below `parent`, else the system's temporary directory."""
    directory = own_directory(TRANSFER, parent or tempfile.gettempdir())
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def own_directory(prefix: str, parent: str | Path) -> str:
    """A fresh directory below `parent`, under this process's number; what killed ones have left there is removed."""
    remove_abandoned(Path(parent))
    return tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent)


def remove_abandoned(place: Path) -> None:
    """Delete the weights that runs that were killed have left in `place`, which may be shared memory."""
    for prefix in (TRANSFER, KEPT):
        for directory in place.glob(f"{prefix}*"):
            with contextlib.suppress(ValueError, OSError):
                owner = int(directory.name.removeprefix(prefix).split("-")[0])
                if not _runs(owner) and directory.stat().st_uid == os.getuid():
                    shutil.rmtree(directory, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


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


def _as_texts(header: Mapping[str, Any]) -> dict[str, str]:
    """safetensors keeps texts only."""
    return {name: json.dumps(value) for name, value in header.items() if value is not None or name == "version"}


def _check_fit(
    found: Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]], into: Mapping[str, torch.Tensor], what: str
) -> None:
    """Raise SyncError, naming the tensors, unless `found` has the names, types and shapes of `into`."""
    problems = []
    if missing := sorted(set(into) - set(found)):
        problems.append(f"missing: {_listed(missing)}")
    if unexpected := sorted(set(found) - set(into)):
        problems.append(f"unexpected: {_listed(unexpected)}")
    wrong = [
        f"{name} is {found[name][0]} {list(found[name][1])}, the engine's is {target.dtype} {list(target.shape)}"
        for name, target in into.items()
        if name in found and found[name] != (target.dtype, tuple(target.shape))
    ]
    if wrong:
        problems.append(_listed(wrong))
    if problems:
        raise SyncError(f"{what}: {'; '.join(problems)}. Learner and engine must hold the same model")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
