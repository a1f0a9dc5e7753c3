"""The benchmark of shared prefixes: the same answers first, and a batch that has what its case says in common."""

from __future__ import annotations

import pytest

from keel.bench.measure import BenchError
from keel.bench.prefixes import Case, batch_of, measure_prefixes


def test_a_batch_has_a_prompt_for_each_group():
    case = Case.read("12x6")
    (m,) = batch_of(case).micro_batches
    starts = m.cu_seqlens[:-1].long()
    assert len(starts) == case.groups * case.attempts
    prompts = [tuple(m.input_ids[start : start + 12].tolist()) for start in starts]
    assert len(set(prompts)) == case.groups
    assert len(set(prompts[: case.attempts])) == 1
    assert 3 * len(starts) <= int(m.loss_mask.sum()) <= 6 * len(starts)


def test_a_row_says_what_was_saved():
    (row,) = measure_prefixes(["12x6"], rounds=1).rows
    assert 0.5 < row["saved_share"] < 1.0
    assert row["equal_to"] < 1e-4
    assert row["ours_ms"] > 0
    assert row["low"] <= row["ratio"] <= row["high"]


@pytest.mark.parametrize("text", ["12", "x6", "0x6", "12x1", "ax6"])
def test_a_case_is_two_numbers(text):
    with pytest.raises(BenchError, match="PROMPTxREPLY"):
        Case.read(text)


def test_an_unknown_type_is_refused():
    with pytest.raises(BenchError, match="float8"):
        measure_prefixes(["12x6"], dtype="float8")
