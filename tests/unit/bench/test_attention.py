"""`keel bench attention`, at sizes that take no time: what is compared agrees, and what does not is not timed."""

from __future__ import annotations

import pytest
import torch

from keel.bench import attention
from keel.bench.attention import Work, measure_attention
from keel.bench.measure import BenchError

SMALL = [Work((96,), 4, 2, None, torch.float32), Work((96,), 4, 4, None, torch.bfloat16)]


@pytest.mark.soak
def test_everybody_computes_the_same_and_every_peer_gets_a_row(monkeypatch):
    monkeypatch.setattr(attention, "_speed_work", lambda _: iter(SMALL))
    result = measure_attention(rounds=2, parts=["speed"])
    assert [(row["case"], row["peer"]) for row in result.rows] == [
        (work.case, peer) for work in SMALL for peer in ("stock", "eager")
    ]
    assert result.rows[0]["case"] == "T 96, 4/2 heads, float32, full"
    for row in result.rows:
        assert row["low"] <= row["ratio"] <= row["high"]
        assert 0 < row["equal_to"] < (1e-5 if "float32" in row["case"] else 2**-5)
        assert row["ours"] == "keel (cpu)"


def test_stock_is_the_same_attention_without_sinks():
    mine, stock = SMALL[0].ours(sinks=False)(), SMALL[0].stock()()
    assert len(mine) == len(stock) == 4
    for got, want in zip(mine, stock, strict=True):
        assert (got - want).abs().max() < 1e-5


def test_a_window_is_checked_against_eager():
    work = Work((96,), 4, 2, 9, torch.float32)
    for got, want in zip(work.ours()(), work.eager()(), strict=True):
        assert (got - want).abs().max() < 1e-4


def test_results_that_differ_are_not_timed(monkeypatch):
    """A peer that is off by a hundredth."""
    plain = Work.eager

    def other(self):
        run = plain(self)
        return lambda: [1.01 * result for result in run()]

    monkeypatch.setattr(Work, "eager", other)
    monkeypatch.setattr(attention, "_speed_work", lambda _: iter(SMALL[:1]))
    with pytest.raises(BenchError, match="T 96, 4/2 heads, float32, full, eager: the results differ"):
        measure_attention(rounds=1, parts=["speed"])


def test_memory_is_measured_in_a_process_of_its_own_and_unknown_parts_are_refused():
    row = attention._memory_row("keel", 2048, 128, torch.device("cpu"))
    assert row["case"] == "T 2,048, 8/8 heads, float32, window 128"
    assert 10 < row["mib"] < 200  # q, k, v, out and their gradients are 4 MiB each
    assert row["kib_per_token"] == pytest.approx(row["mib"] / 2, abs=0.1)
    with pytest.raises(BenchError, match="parts are speed, window, memory; got 'time'"):
        measure_attention(rounds=1, parts=["time"])
