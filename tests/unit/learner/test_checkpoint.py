"""Checkpoint directories: whole or not there, and what is damaged is found out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from keel.learner.checkpoint import CheckpointError, latest_checkpoint, prune, verify, writing


def write(path, step, content=b"weights"):
    with writing(path, step) as directory:
        (directory / "weights").mkdir()
        (directory / "weights" / "w.bin").write_bytes(content)
        (directory / "learner.json").write_text("{}")


def test_what_was_written_is_whole(tmp_path):
    write(tmp_path / "000003", 3)
    assert verify(tmp_path / "000003") == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000003"]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda c: (c / "weights" / "w.bin").write_bytes(b"Weights"), "bytes of .* have changed"),
        (lambda c: os.truncate(c / "weights" / "w.bin", 3), "has 3 bytes instead of 7"),
        (lambda c: (c / "learner.json").unlink(), "learner.json is missing"),
        (lambda c: (c / "manifest.json").unlink(), "never finished"),
        (lambda c: os.truncate(c / "manifest.json", 20), "manifest.json is damaged"),
        (lambda c: (c / "manifest.json").write_text('{"schema_version": 9}'), "schema_version 9"),
        (lambda c: (c / "manifest.json").write_text("[]"), "schema_version None"),
    ],
)
def test_damage_is_told_and_the_previous_one_is_found(tmp_path, harm, message):
    write(tmp_path / "000003", 3)
    write(tmp_path / "000005", 5)
    assert latest_checkpoint(tmp_path) == tmp_path / "000005"
    harm(tmp_path / "000005")
    with pytest.raises(CheckpointError, match=message):
        verify(tmp_path / "000005")
    assert latest_checkpoint(tmp_path) == tmp_path / "000003"


class Killed(BaseException):
    """Ends the writer where it stands; no `except Exception` may catch it."""


@pytest.mark.parametrize("at", range(1, 40))
def test_a_kill_at_any_system_call_leaves_a_whole_checkpoint(tmp_path, monkeypatch, at):
    """Saving step 5 twice over (after a resume it is made again) and step 7, with a kill at each rename and fsync."""
    write(tmp_path / "000003", 3)
    calls = [0]

    def killing(original):
        def call(*arguments, **options):
            calls[0] += 1
            if calls[0] == at:
                raise Killed
            return original(*arguments, **options)

        return call

    done = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killing(os.fsync))
        patch.setattr(Path, "rename", killing(Path.rename))
        try:
            for step, name in ((5, "000005"), (5, "000005"), (7, "000007")):
                write(tmp_path / name, step)
                done.append(step)
            prune(tmp_path, 1)
            done.append("pruned")
        except Killed:
            pass
    found = latest_checkpoint(tmp_path)
    assert verify(found) >= max([3, *(step for step in done if step != "pruned")])
    write(tmp_path / "000009", 9)  # and the next save cleans up
    prune(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["000009"]


def test_the_newest_are_kept(tmp_path):
    for step in (1, 20, 3, 10):
        write(tmp_path / f"c{step}", step)
    prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c10", "c20"]
    with pytest.raises(ValueError, match="keep=0"):
        prune(tmp_path, 0)


def test_nothing_there(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    (tmp_path / "stray.txt").write_text("x")
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="does not exist or was never finished"):
        verify(tmp_path / "none")


def test_the_manifest_is_json_for_other_programs(tmp_path):
    write(tmp_path / "c", 4)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest["schema_version"] == 1
    assert set(manifest["files"]) == {"learner.json", "weights/w.bin"}
    assert manifest["files"]["weights/w.bin"]["bytes"] == 7
