"""The benchmark of experts: the same answers first; what is compared is what it says."""

from __future__ import annotations

import pytest
import torch

from keel.bench import experts
from keel.bench.experts import Case, Layer, measure_experts
from keel.bench.measure import BenchError

SMALL = Case(16, 96, 4, 2, torch.float32)


def test_every_way_is_compared_and_must_agree(monkeypatch):
    monkeypatch.setattr(experts, "CASES", {16: SMALL})
    result = measure_experts([16], rounds=1, with_memory=False)
    peers = [row["peer"] for row in result.rows]
    assert {"grouped_mm", "eager", "batched_mm"} < set(peers)
    assert any(peer.startswith("bare products") for peer in peers)
    assert all(row["equal_to"] < 1e-5 for row in result.rows if "equal_to" in row)
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in result.rows)
    monkeypatch.setattr(experts, "TOLERANCE", {torch.float32: 0.0})
    with pytest.raises(BenchError, match="grouped_mm"):
        measure_experts([16], rounds=1, with_memory=False)


def test_ways_that_would_gather_too_much_are_told_and_not_run(monkeypatch):
    monkeypatch.setattr(experts, "CASES", {16: SMALL})
    monkeypatch.setattr(experts, "GATHERED_LIMIT", SMALL.gathered_bytes - 1)
    result = measure_experts([16], rounds=1, with_memory=False)
    assert "batched_mm" not in {row["peer"] for row in result.rows}
    assert any("batched_mm would gather" in note for note in result.notes)


def test_bare_products_are_the_six_of_each_expert_over_its_own_tokens():
    layer, operations = Layer(SMALL), []
    layer.products(lambda a, b, n: operations.append(2 * a.shape[0] * a.shape[1] * b.shape[1]), filled=False)
    assert len(operations) == 6 * SMALL.experts
    pairs = SMALL.tokens * SMALL.active
    assert sum(operations) == 3 * pairs * 2 * (SMALL.hidden * 2 * SMALL.hidden + SMALL.hidden * SMALL.hidden)


def test_an_unknown_size_is_refused():
    with pytest.raises(BenchError, match="got 64"):
        measure_experts([64], rounds=1)
