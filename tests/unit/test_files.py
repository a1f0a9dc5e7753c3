"""A file is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from keel.files import write_whole


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_write_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    path = tmp_path / "record"
    write_whole(path, b"old")

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((os, "fsync", die) if at == "fsync" else (Path, "replace", die)))
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new and longer")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    write_whole(path, b"newest")
    assert path.read_bytes() == b"newest"
