"""Comparisons: who runs when, what is made of the times, what is refused, and what memory a call takes."""

from __future__ import annotations

import gc
import json
import mmap

import pytest
import torch

from keel.bench.measure import (
    BenchError,
    BenchResult,
    Times,
    alternately,
    machine,
    peak_bytes,
    peak_bytes_apart,
    require_close,
)

MIB = 2**20


def test_contenders_take_turns_and_each_goes_first_as_often():
    ran = []
    contenders = {name: lambda name=name: ran.append(name) for name in "ab"}
    times = alternately(contenders, rounds=2, warmups=1)
    assert "".join(ran) == "ab" + "ba" + "ab"
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"a": 2, "b": 2}


def test_what_a_contender_only_began_is_ended_within_its_time():
    done = []
    alternately({"a": lambda: done.append("run")}, rounds=1, warmups=0, finish=lambda: done.append("finish"))
    assert done == ["finish", "run", "finish"]


def test_garbage_is_not_collected_while_one_runs():
    was = []
    alternately({"a": lambda: was.append(gc.isenabled())}, rounds=1, warmups=0)
    assert was == [False]
    assert gc.isenabled()


def test_a_ratio_is_the_median_of_the_rounds_own_ratios():
    times = Times({"ours": (1.0, 1.0, 10.0), "peer": (2.0, 3.0, 40.0)})
    ratio = times.ratio("peer", "ours")
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 4.0)
    uneven = Times({"ours": (1.0, 2.0, 4.0), "peer": (4.0, 2.0, 12.0)})
    assert uneven.ratio("peer", "ours").median == 3.0  # medians alone: 4 / 2


@pytest.mark.parametrize(("contenders", "rounds"), [({}, 3), ({"a": int}, 0)])
def test_nothing_to_time_is_refused(contenders, rounds):
    with pytest.raises(BenchError, match="nothing to time"):
        alternately(contenders, rounds=rounds)


def test_results_that_differ_are_not_compared():
    peer = torch.tensor([4.0, -8.0])
    assert require_close("same", peer, peer, tolerance=0.0) == 0.0
    assert require_close("near", peer + 0.08, peer, tolerance=0.011) == pytest.approx(0.01, rel=1e-3)
    for other in (peer + 0.1, torch.tensor([float("nan"), -8.0]), torch.ones(3)):
        with pytest.raises(BenchError, match="off"):
            require_close("off", other, peer, tolerance=0.011)


def test_peak_memory_is_what_was_taken_and_given_back_inside():
    def take():
        with mmap.mmap(-1, 48 * MIB) as memory:
            memory.write(b"\1" * (48 * MIB))

    assert 47 * MIB <= peak_bytes(take) < 112 * MIB  # the bytes written are there for a moment, too
    assert peak_bytes(lambda: None) < 8 * MIB


def test_peak_memory_in_a_fresh_process_leaves_out_what_was_prepared(monkeypatch, tmp_path):
    (tmp_path / "memory_target.py").write_text(
        "def prepared(size_mib):\n"
        "    kept = b'\\1' * (64 * 2**20)\n"
        "    return lambda: (len(kept), len(b'\\1' * (size_mib * 2**20)))\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert 31 * MIB <= peak_bytes_apart("memory_target:prepared", size_mib=32) < 48 * MIB
    with pytest.raises(BenchError, match="no_such_function"):
        peak_bytes_apart("memory_target:no_such_function")


def test_a_result_is_written_a_row_to_a_line_with_what_it_was_measured_on(tmp_path):
    rows = [{"case": "a", "ratio": 1.5}, {"case": "b", "ratio": 2.0}]
    result = BenchResult("made up", "keel bench made-up", machine("pytest"), rows, ["a note"])
    result.write(tmp_path / "deep" / "result.json")
    text = (tmp_path / "deep" / "result.json").read_text(encoding="utf-8")
    read = json.loads(text)
    assert read["rows"] == rows
    assert read["command"] == "keel bench made-up"
    assert read["machine"]["threads"] == torch.get_num_threads()
    assert read["machine"]["packages"]["pytest"] == pytest.__version__
    assert '{"case": "b", "ratio": 2.0}' in [line.strip() for line in text.splitlines()]
