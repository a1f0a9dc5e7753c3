"""The engine's benchmark compares what it says it compares, and refuses what does not agree."""

from __future__ import annotations

import pytest
import torch

from keel.bench import engine as bench
from keel.bench.measure import BenchError


@pytest.fixture
def small(monkeypatch):
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 300}
    monkeypatch.setattr(bench, "SHAPE", {**bench.SHAPE, **shape})
    monkeypatch.setattr(bench, "NUM_SEQUENCES", 5)
    monkeypatch.setattr(bench, "NEW_TOKENS", 6)


@pytest.mark.parametrize("case", ["equal", "ragged"])
def test_a_row_for_each_peer_with_log_probs_that_agree(small, case):
    threads = torch.get_num_threads()
    (row,) = bench.measure_engine([case], ["transformers"], threads=[1], rounds=1)
    torch.set_num_threads(threads)
    assert row["ours"] == "keel, 1 threads"
    assert row["peer"].startswith("transformers, experts")
    assert 0.0 < row["equal_to"] < 1e-5
    assert row["low"] == row["ratio"] == row["high"] > 0.0


def test_log_probs_that_do_not_agree_are_not_timed(small, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(bench, "_cut", lambda tokens, logprobs, _: (tokens, [value - 0.01 for value in logprobs]))
    with pytest.raises(BenchError, match="log-probs of transformers: the results differ"):
        bench.measure_engine(["equal"], ["transformers"], threads=[1], rounds=1)
    torch.set_num_threads(threads)


def test_a_reply_ends_with_its_first_stop():
    assert bench._cut([5, 7, 9, 7, 0, 0], [-1.0, -2.0, -3.0, -4.0, 0.0, 0.0], (9, 7)) == ([5, 7], [-1.0, -2.0])
    assert bench._cut([5, 7], [-1.0, -2.0], ()) == ([5, 7], [-1.0, -2.0])


@pytest.mark.parametrize(("cases", "peers", "word"), [(["equl"], [], "equl"), (["equal"], ["trl"], "trl")])
def test_what_there_is_none_of_is_refused(cases, peers, word):
    with pytest.raises(BenchError, match=word):
        bench.measure_engine(cases, peers, threads=[1], rounds=1)
