"""The benchmark of log-probs: the same answers first, and the gradients' distance from float64."""

from __future__ import annotations

import pytest
import torch

from keel.bench import logprobs
from keel.bench.logprobs import Sizes, measure_logprobs
from keel.bench.measure import BenchError

SMALL = Sizes(tokens=48, hidden=24, vocabulary=5000)


def test_rows_say_times_memory_and_distances():
    result = measure_logprobs(["float32", "bfloat16"], rounds=1, sizes=SMALL)
    peers = {(row["case"].rsplit(" ", 1)[1], row["peer"]) for row in result.rows}
    assert {("float32", "plain"), ("bfloat16", "plain"), ("bfloat16", "keel, float32 products")} <= peers
    assert ("float32", "gradients in float64") in peers
    for row in result.rows:
        assert row["equal_to"] < 3e-2
        assert "ratio" not in row or row["low"] <= row["ratio"] <= row["high"]


def test_a_peer_that_differs_is_not_timed(monkeypatch):
    plain = logprobs._plain
    monkeypatch.setattr(logprobs, "_plain", lambda problem: 1.001 * plain(problem))
    with pytest.raises(BenchError, match="plain differs"):
        measure_logprobs(["float32"], rounds=1, sizes=SMALL)


def test_gradients_that_are_off_are_refused(monkeypatch):
    monkeypatch.setattr(logprobs, "TOLERANCE_FLOAT64", 1e-12)
    with pytest.raises(BenchError, match="from float64's"):
        measure_logprobs(["float32"], rounds=1, sizes=SMALL)


def test_a_difference_is_found_in_any_slice():
    ours = torch.zeros(3 * logprobs.SLICE + 5, 2)
    theirs = torch.ones_like(ours)
    ours += 1
    ours[-1, 1] += 1.0
    with pytest.raises(BenchError, match="differs by 1 of"):
        logprobs._apart(SMALL, "plain", ours, theirs)


def test_an_unknown_type_is_refused():
    with pytest.raises(BenchError, match="float8"):
        measure_logprobs(["float8"], rounds=1)
