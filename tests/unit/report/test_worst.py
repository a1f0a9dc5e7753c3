"""The worst tokens of a run, as the report takes them from rows of any kind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from keel.report.worst import MAX_TEXT, SHOWN, worst_tokens


def run_of(*rows):
    return SimpleNamespace(rows_of=lambda kind: [row for row in rows if row["kind"] == kind])


def row(step, *tokens, **changes):
    return {"kind": "worst_tokens", "stage": "reinforcement", "step": step, "tokens": list(tokens), **changes}


def token(gap, **changes):
    made = {"where": "000000.000/1", "position": 7, "rollout_logprob": -1.0, "learner_logprob": gap - 1.0, "gap": gap}
    return {**made, "text": "x", "before": "y", **changes}


def test_the_largest_of_all_steps_come_first():
    found = worst_tokens(run_of(row(0, token(0.1), token(-0.3)), row(5, token(-0.2)), {"kind": "step"}))
    assert [(each["step"], each["gap"]) for each in found] == [(0, -0.3), (5, -0.2), (0, 0.1)]
    assert found[0] == {
        "step": 0, "where": "000000.000/1", "position": 7, "engine": -1, "learner": -1.3, "gap": -0.3,
        "text": "x", "before": "y",
    }  # fmt: skip
    assert len(worst_tokens(run_of(*(row(step, token(0.1)) for step in range(40))))) == SHOWN


def test_what_stands_right_before_is_kept():
    (found,) = worst_tokens(run_of(row(0, token(0.1, before="a" * 500 + "end", text="start" + "b" * 500))))
    assert (len(found["before"]), len(found["text"])) == (MAX_TEXT, MAX_TEXT)
    assert found["before"].endswith("end")
    assert found["text"].startswith("start")


@pytest.mark.parametrize(
    "damaged",
    [
        row(0, tokens=None),
        row(0, tokens="x"),
        row(0, 3, None, "x"),
        row(0, {}),
        row(0, token(float("nan"))),
        row(0, {**token(0.5), "gap": "0.5"}),
        row(0, token(0.5), stage="warm_start"),
    ],
)
def test_what_is_damaged_is_left_out(damaged):
    assert [each["gap"] for each in worst_tokens(run_of(damaged, row(1, token(0.25))))] == [0.25]


def test_texts_that_are_none_stay_none_and_secrets_are_taken_out():
    secret = "hf_" + "a1B2" * 8
    found = worst_tokens(run_of(row("x", token(0.1, text=None, before=secret, position="far"))))
    assert (found[0]["text"], found[0]["step"], found[0]["position"]) == (None, 0, 0)
    assert secret not in found[0]["before"]
