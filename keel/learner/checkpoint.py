"""Checkpoint directories: written whole or not at all, and proven whole before they are read.

000120/
  manifest.json           step, and the size and SHA-256 of every other file: its presence is the commit
  learner.json            stage, step, version, schedule position, and what the caller put in
  learner.safetensors     float32 masters, moments, reference, random states
  weights/                an ordinary Hugging Face directory, tokenizer included
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keel.files import sync
from keel.types import Fault

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights"
_UNFINISHED = ".unfinished"
_REPLACED = ".replaced"

logger = logging.getLogger(__name__)


class CheckpointError(Fault, RuntimeError):
    """A checkpoint is missing, damaged, unfinished, or of another model; the message says which file and what to do."""


@contextmanager
def writing(path: Path, step: int) -> Iterator[Path]:
    """Write a checkpoint into the directory this yields; it becomes `path` by a rename when the block ends well.

    Every byte is on disk before the rename, and the rename before this returns: a kill at any moment leaves either no
    checkpoint `path` or all of it. An older `path` stays readable until the new one is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + _UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    yield unfinished
    files = {str(file.relative_to(unfinished)): _fingerprint(file) for file in _files(unfinished)}
    manifest = {"schema_version": SCHEMA_VERSION, "step": step, "files": files}
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for item in [*_files(unfinished), *(directory for directory in unfinished.rglob("*") if directory.is_dir())]:
        sync(item)
    sync(unfinished)
    _install(unfinished, path)
    sync(path.parent)


def _install(unfinished: Path, path: Path) -> None:
    # A directory cannot be renamed onto a full one. What was there keeps a name that `latest_checkpoint` reads too.
    replaced = path.with_name(path.name + _REPLACED)
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    unfinished.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def verify(path: str | Path) -> int:
    """Check that every file of the checkpoint is there and unharmed; returns its step, else raises CheckpointError."""
    path = Path(path)
    manifest = _manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path}: {name} is missing; take an older checkpoint")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"checkpoint {path}: {name} has {size} bytes instead of {expected['bytes']}; take an older checkpoint"
            )
        if _fingerprint(file) != expected:
            raise CheckpointError(f"checkpoint {path}: the bytes of {name} have changed; take an older checkpoint")
    return int(manifest["step"])


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The whole checkpoint of the highest step in `directory`, or None; damaged ones are passed over with a warning."""
    for _, path in sorted(_candidates(Path(directory)), reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            logger.warning("%s", error)
            continue
        return path
    return None


def checkpoint_to_resume(directory: str | Path) -> Path | None:
    """The newest whole checkpoint, alone with older ones: damaged later ones are doomed, the next `prune` removes them.

    None if there is none at all; raises CheckpointError if there are some and every one is damaged, because beginning
    anew would cut off everything the run has done.
    """
    directory = Path(directory)
    path = latest_checkpoint(directory)
    named = sorted(item for item in directory.glob("*") if item.is_dir() and item.name.isdecimal())
    if path is None and named:
        raise CheckpointError(
            f"{directory}: none of {len(named)} checkpoints is whole; restore one from a copy, or delete them all to "
            "begin the run anew"
        )
    step = int(_manifest(path)["step"]) if path is not None else 0
    for later in (item for item in named if int(item.name) > step):
        doomed = later.with_name(later.name + _UNFINISHED)
        shutil.rmtree(doomed, ignore_errors=True)
        later.rename(doomed)
    return path


def prune(directory: str | Path, keep: int) -> None:
    """Remove all but the `keep` checkpoints of the highest steps, and what an interrupted save left behind."""
    if keep < 1:
        raise ValueError(f"prune: got keep={keep}; at least one checkpoint must stay")
    directory = Path(directory)
    for path in directory.glob(f"*{_UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)
    for _, path in sorted(_candidates(directory), reverse=True)[keep:]:
        # Renamed first: a kill during the removal leaves rubbish, not half a checkpoint under its own name.
        doomed = path.with_name(path.name + _UNFINISHED)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _candidates(directory: Path) -> Iterator[tuple[int, Path]]:
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.name.endswith(_UNFINISHED) or not path.is_dir():
            continue
        try:
            yield int(_manifest(path)["step"]), path
        except CheckpointError as error:
            logger.warning("%s", error)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: Any = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint {path}: no {MANIFEST}, so it does not exist or was never finished; take an older checkpoint"
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {path}: {MANIFEST} is damaged ({error}); take an older checkpoint"
        ) from error
    found = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if found != SCHEMA_VERSION or not {"step", "files"} <= manifest.keys():
        raise CheckpointError(
            f"checkpoint {path}: schema_version {found!r}, this program reads {SCHEMA_VERSION}; "
            "take another checkpoint, or the version of Keel that wrote this one"
        )
    whole: dict[str, Any] = manifest
    return whole


def _files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.rglob("*") if file.is_file())


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
