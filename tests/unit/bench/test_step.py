"""The step's comparison: forced lengths hold, the two trainers make the same gradient, a failing side says so."""

from __future__ import annotations

import os

import pytest
import torch

from keel.bench.measure import BenchError
from keel.bench.step import work as given
from keel.bench.step.keel_side import run_keel
from keel.bench.step.measure import _least_disturbed, _require_same_work, _rows
from keel.bench.step.side import Gate, Side
from keel.bench.step.work import CALL, Work, build, prompt_ids

TOOL = Work("tool, 2 x 6 new tokens", 6, turns=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("step") / "model"
    build(TOOL, path)
    return path


def test_prompts_are_different_and_of_one_length(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = (model / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(prompts)) == given.NUM_PROMPTS
    assert {len(prompt_ids(tokenizer, prompt)) for prompt in prompts} == {given.PROMPT_TOKENS}
    assert len(tokenizer.encode(CALL)) == 1


def test_the_model_is_of_the_size_that_is_told(model):
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model)
    assert sum(parameter.numel() for parameter in policy.parameters()) == pytest.approx(4.0e6, rel=0.05)


@pytest.mark.soak
def test_both_make_the_same_gradient_of_episodes_with_a_tool(model, tmp_path):
    from keel.bench.step.equal import compare  # which imports TRL: only where it is needed

    threads = torch.get_num_threads()
    given_to = {"work": TOOL, "model": str(model), "threads": threads}
    with Side(compare, scratch=str(tmp_path), **given_to) as side:
        assert side.ready["apart"] < 1e-5
        # 64 episodes: a prompt, two replies, and what the tool said between them.
        assert side.ready["tokens"] > 64 * (given.PROMPT_TOKENS + 2 * TOOL.reply_tokens)


def test_a_step_of_keels_draws_what_was_asked_for_and_reports_where_time_went(model, tmp_path):
    given_to = {"work": TOOL, "model": str(model), "threads": 1, "check": True}
    with Side(run_keel, run_dir=str(tmp_path / "run"), **given_to) as side:
        report = side.step()
    assert (report["loss_tokens"], report["updates"]) == (TOOL.drawn_tokens, 1)
    assert 0 < report["generate_s"] + report["score_s"] + report["update_s"] <= report["step_s"]
    assert report["extra_bytes"] > 4 * 4.0e6  # the weights, at least


def test_the_distance_of_two_gradients_is_by_the_seconds_norm():
    from keel.bench.step.equal import distance

    theirs = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert distance(theirs, theirs) == 0.0
    assert distance({"a": torch.tensor([3.0]), "b": torch.tensor([4.5])}, theirs) == pytest.approx(0.1)
    assert distance({"a": torch.tensor([3.0]), "b": torch.tensor([float("nan")])}, theirs) != pytest.approx(0.0)
    with pytest.raises(BenchError, match="other parameters"):
        distance({"a": torch.ones(1)}, theirs)


REPORT = {"step_s": 2.0, "generate_s": 1.0, "score_s": 0.1, "update_s": 0.8, "extra_bytes": 2**21, "others_share": 0.01}
SLOWER = {name: 2 * value for name, value in REPORT.items()}


def test_rows_have_the_step_with_memory_and_equality_and_then_its_parts():
    rows = _rows(TOOL, "keel", {"keel": [REPORT] * 3, "TRL": [SLOWER] * 3}, apart=1.234e-6, tokens=100)
    assert [row["part"] for row in rows] == ["step", "generate", "score", "update"]
    whole = rows[0]
    assert (whole["ours_ms"], whole["peer_ms"], whole["ratio"]) == (2000.0, 4000.0, 2.0)
    assert (whole["ours_mib"], whole["peer_mib"], whole["equal_to"]) == (2, 4, 1.2e-6)
    assert (whole["ours_tokens_per_s"], whole["others_share"]) == (50, 0.02)


class Played:
    """Stands for a side: its steps are disturbed as told."""

    def __init__(self, shares):
        self.left = list(shares)
        self.reports = []

    def step(self):
        self.reports.append({"others_share": self.left.pop(0), "round": len(self.reports)})


def test_rounds_that_others_disturbed_are_taken_anew_and_chosen_by_that_alone():
    sides = {"ours": Played([0.9, 0.0, 0.0, 0.4, 0.01, 0.5]), "peer": Played([0.9, 0.3, 0.02, 0.0, 0.0, 0.5])}
    chosen = _least_disturbed(sides, 2)
    assert [report["round"] for report in chosen["ours"]] == [2, 4]
    assert [report["round"] for report in chosen["peer"]] == [2, 4]
    assert len(sides["ours"].reports) == 5  # enough then


@pytest.mark.parametrize(("tokens", "updates"), [(TOOL.drawn_tokens - 1, 1), (TOOL.drawn_tokens, 0)])
def test_sides_that_did_other_work_are_not_compared(tokens, updates):
    right = {"loss_tokens": TOOL.drawn_tokens, "updates": 1}
    _require_same_work(TOOL, {"keel": [right], "TRL": [right]})
    with pytest.raises(BenchError, match="TRL learned from"):
        _require_same_work(TOOL, {"keel": [right], "TRL": [right, {"loss_tokens": tokens, "updates": updates}]})


def fails_at_the_second_step(gate: Gate) -> None:
    gate.wait({"pid": os.getpid()})
    gate.wait({})
    raise RuntimeError("on purpose")


def dies(gate: Gate) -> None:
    gate.wait({})
    os.write(2, b"last words")
    os._exit(3)


def test_a_side_is_another_process_whose_failure_is_told():
    with Side(fails_at_the_second_step) as side:
        assert side.ready["pid"] != os.getpid()
        assert side.step()["others_share"] >= 0.0
        with pytest.raises(BenchError, match="on purpose"):
            side.step()
    with Side(dies) as side, pytest.raises(BenchError, match="last words"):
        side.step()
