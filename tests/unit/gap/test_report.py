"""What is printed, written and shown of a gap: complete, finite, and safe whatever a model wrote."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import keel
from keel.cli.program import app
from keel.gap.log import GapLog, LoggedSequence
from keel.gap.measure import measure
from keel.gap.statistics import PEER_METRICS
from tests.hostile import HOSTILE

ARRAYS = {"rollout_logprobs": [-1.0, -2.0], "learner_logprobs": [-1.5, -2.0], "token_ids": [3, 4]}


def log(count=4, gap=0.5, where="here"):
    rollout = -np.arange(1.0, count + 1)
    ids = np.arange(count)
    return GapLog("arrays", (LoggedSequence(where, "one", ids, ids >= 0, rollout, rollout - gap),))


def test_the_table_has_every_figure_and_says_what_is_above_its_band():
    text = str(measure(log()))
    for name in ("|d| 99th percentile", "k3", "effective sample size", "token TIS, cap 2", "worst tokens", "4 drawn"):
        assert name in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for metric in PEER_METRICS:
        assert metric.band in lines[metric.name]
    assert " above " in lines["rollout_probs_diff_mean"]
    assert " ok " in str(measure(log(gap=0.0))).split("rollout_probs_diff_mean")[1].splitlines()[0]
    assert "id 3" in text  # without a tokenizer


@pytest.mark.parametrize(
    ("gap", "words"),
    [(2e-7, "is rounding, in float32 too"), (1e-3, "is usual in bfloat16"), (0.2, "more than rounding explains")],
)
def test_the_verdict_is_by_the_bands_of_a_run(gap, words):
    """The bands of others are wide: slime calls a mean difference of 0.05 healthy in any type."""
    report = measure(log(gap=gap))
    assert words in report.verdict
    assert str(report).splitlines()[1] == report.verdict == report.to_json()["verdict"]


def test_a_model_that_was_not_needed_is_told(tmp_path):
    notes = keel.mismatch(ARRAYS, model=tmp_path).notes
    assert notes == (f"{tmp_path} was not used: the log has the learner's log-probs",)


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_what_a_model_wrote_is_neither_obeyed_nor_a_line_of_its_own(name):
    report = measure(log(where=HOSTILE[name][:2000]), words=lambda ids: HOSTILE[name], worst=3)
    text = str(report)
    assert all(char.isprintable() or char == "\n" or char == " " for char in text if char != "\u00a0")
    assert len(text.splitlines()) == len(str(measure(log(), words=lambda ids: "a", worst=3)).splitlines())
    json.loads(json.dumps(report.to_json(), allow_nan=False))
    page = report._repr_html_()
    assert "<script" not in page.lower()
    assert "<img" not in page.lower()
    assert "<iframe" not in page.lower()


def test_secrets_are_taken_out():
    secret = "hf_" + "a1B2" * 8
    report = measure(log(where=secret), words=lambda ids: f"x {secret} y")
    assert secret not in json.dumps(report.to_json())
    assert secret not in str(report)


def test_what_overflows_is_null_in_json():
    rollout = np.array([-900.0, -1.0])
    one = LoggedSequence("here", "one", np.arange(2), np.ones(2, dtype=bool), rollout, np.array([-1.0, -1.0]))
    value = json.loads(json.dumps(measure(GapLog("x", (one,))).to_json(), allow_nan=False))
    assert value["statistics"]["k3"] is None
    assert value["statistics"]["abs_max"] == 899.0
    assert {each["name"]: each["healthy"] for each in value["peers"]}["gen_kl_error"] is False


def test_the_command_prints_and_writes(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ARRAYS))
    out = tmp_path / "out.json"
    done = CliRunner().invoke(app, ["mismatch", str(tmp_path / "a.json"), "--json", str(out), "--worst", "1"])
    assert done.exit_code == 0, done.output
    assert "2 drawn tokens of 1 sequences" in done.output
    written = json.loads(out.read_text())
    assert written == keel.mismatch(ARRAYS | {}, worst=1).to_json() | {"worst": written["worst"]}
    assert [each["position"] for each in written["worst"]] == [0]


def test_the_command_refuses_in_words(tmp_path, capsys, monkeypatch):
    import sys

    from keel.cli.program import main

    file = tmp_path / "a.json"
    file.write_text('{"x": [1]}')
    monkeypatch.setattr(sys, "argv", ["keel", "mismatch", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert str(file) in said
    assert "rollout_logprobs" in said
    assert "Traceback" not in said


def test_a_log_of_some_thousand_tokens_names_the_worst_in_order():
    draw = np.random.default_rng(0)
    rollout = -draw.random(5000) * 5
    learner = np.minimum(rollout + draw.normal(0, 0.1, 5000), 0)
    ids = np.arange(5000)
    report = measure(GapLog("x", (LoggedSequence("h", "o", ids, ids % 3 > 0, rollout, learner),)), worst=50)
    gaps = np.where(ids % 3 > 0, np.abs(learner - rollout), -1)
    assert [each.position for each in report.worst] == np.argsort(-gaps, kind="stable")[:50].tolist()
