"""Rows survive kills: a torn line is left out and cut off, nothing is lost in silence."""

from __future__ import annotations

import errno
import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel.monitor.rows import (
    SCHEMA_VERSION,
    RunDirectoryError,
    append_row,
    plain_numbers,
    read_json,
    read_rows,
    truncate_rows,
    write_json,
    write_text,
)


def test_every_row_and_file_carries_the_schema_version(tmp_path):
    append_row(tmp_path / "rows", {"step": 0})
    write_json(tmp_path / "value", {"a": 1})
    assert read_rows(tmp_path / "rows") == [{"schema_version": SCHEMA_VERSION, "step": 0}]
    assert read_json(tmp_path / "value") == {"schema_version": SCHEMA_VERSION, "a": 1}


@given(cut=st.integers(0, 200), keep=st.integers(0, 4))
def test_a_file_cut_anywhere_reads_as_its_complete_rows(tmp_path_factory, cut, keep):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    for step in range(4):
        append_row(path, {"step": step, "reward/mean": step / 3})
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    complete = data[:cut].count(b"\n")
    assert [row["step"] for row in read_rows(path)] == list(range(complete))
    if keep > complete:
        with pytest.raises(RunDirectoryError, match="rows were lost"):
            truncate_rows(path, keep)
        return
    truncate_rows(path, keep)
    append_row(path, {"step": 99})
    assert [row["step"] for row in read_rows(path)] == [*range(keep), 99]


def test_a_broken_row_before_the_last_is_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\nnot json\n{"a": 2}\n')
    with pytest.raises(RunDirectoryError, match=":2: not a JSON row"):
        read_rows(path)


def test_numbers_json_has_no_word_for_become_null_and_are_spelled_out(tmp_path):
    row = plain_numbers({"a": 1.5, "b": math.nan, "c": -math.inf, "d": None, "e": 3})
    assert row == {"a": 1.5, "b": None, "c": None, "d": None, "e": 3, "not_finite": {"b": "nan", "c": "-inf"}}
    append_row(tmp_path / "rows", row)
    json.loads((tmp_path / "rows").read_text(), parse_constant=pytest.fail)


def test_a_row_that_cannot_be_written_leaves_the_others_readable(tmp_path, monkeypatch):
    """A disk that is full for a while: what was half written is taken back, and later rows stand behind whole ones."""
    path = tmp_path / "metrics.jsonl"
    append_row(path, {"n": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            append_row(path, {"n": 2})
    append_row(path, {"n": 3})
    assert [row["n"] for row in read_rows(path)] == [1, 3]


def test_a_failed_replacement_leaves_the_old_text(tmp_path):
    path = tmp_path / "status.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \udc80")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 999}'])
def test_files_that_cannot_be_trusted_are_refused(tmp_path, text):
    (tmp_path / "value").write_text(text)
    with pytest.raises(RunDirectoryError, match="value"):
        read_json(tmp_path / "value")
