"""Ctrl-C and SIGTERM: the step is finished and saved, the resumed run ends as the undisturbed one, to the bit."""

from __future__ import annotations

import pytest

IN_A_TOOL_CALL = {"at": "keel.envs.tools:Tool.call", "call": 2, "armed_by": ["keel.loop:train_step", 19]}
IN_THE_GRADIENT = {"at": "keel.learner.learner:Learner.backward", "call": 20}
IN_THE_EVALUATION = {"at": "keel.envs.tools:Tool.call", "call": 1, "armed_by": ["keel.loop:close_step", 16]}
IN_A_CHECKPOINT = {"at": "keel.learner.checkpoint:sync", "armed_by": ["keel.build:Parts.save", 9]}
WHILE_THE_MODEL_IS_MADE = {"at": "keel.tiny_start:build_tiny_model"}


def test_ctrl_c_finishes_the_step_and_saves(run, same_as_undisturbed):
    assert run.go({**IN_A_TOOL_CALL, "how": "interrupt"}) == 130, run.output
    waits = "interrupted from the keyboard: finishing reinforcement step 3 of 6 (collecting rollouts: "
    assert waits in run.output
    assert "waiting for" in run.output.partition(waits)[2].splitlines()[0]
    assert "; Ctrl-C again to stop now" in run.output
    assert f"to go on: keel resume {run.path}" in run.output
    assert "Traceback" not in run.output

    reason = "interrupted from the keyboard after reinforcement step 3 of 6"
    for name in ("status.json", "summary.json"):
        written = run.json(name)
        assert (written["state"], written["reason"]) == ("interrupted", reason)
    steps = [row["step"] for row in run.rows() if row.get("stage") == "reinforcement" and row["kind"] == "step"]
    assert steps == [0, 1, 2]
    assert run.checkpoints()[-1] == "000019"

    run.finish()
    assert f"importing what {run.path}/config.toml names: kill_world" in run.output
    same_as_undisturbed(run)


def test_sigterm_in_the_gradient_is_answered_alike(run):
    assert run.go({**IN_THE_GRADIENT, "how": "terminate"}) == 130, run.output
    assert "ended by SIGTERM: finishing reinforcement step 4 of 6 (computing the gradient)" in run.output
    assert run.json("status.json")["reason"] == "ended by SIGTERM after reinforcement step 4 of 6"
    assert run.checkpoints()[-1] == "000020"


def test_before_the_first_step_there_is_nothing_to_finish(run):
    assert run.go({**WHILE_THE_MODEL_IS_MADE, "how": "interrupt"}) == 130, run.output
    assert "finishing" not in run.output
    assert run.json("status.json")["state"] == "interrupted"
    assert run.checkpoints() == []


@pytest.mark.soak
@pytest.mark.parametrize(
    ("aim", "last"),
    [
        pytest.param({**IN_THE_EVALUATION, "how": "interrupt"}, "000016", id="evaluation"),
        pytest.param({**IN_A_CHECKPOINT, "how": "interrupt"}, "000018", id="checkpoint"),
        pytest.param({**IN_THE_GRADIENT, "how": "terminate"}, "000020", id="gradient"),
        pytest.param({**IN_THE_GRADIENT, "how": "at once"}, "000018", id="at_once_in_the_gradient"),
        pytest.param({**WHILE_THE_MODEL_IS_MADE, "how": "interrupt"}, "", id="model"),
    ],
)
def test_wherever_it_comes_the_run_ends_as_the_undisturbed_one(run, same_as_undisturbed, aim, last):
    assert run.go(aim) == 130, run.output
    assert (run.checkpoints() or [""])[-1] == last
    run.finish()
    same_as_undisturbed(run)


@pytest.mark.soak
@pytest.mark.parametrize("sets", ['engine.process="separate"', "learner.ranks=2"])
def test_several_processes_finish_their_step_too(run, other_run, is_same, sets):
    run.sets = other_run.sets = (sets,)
    assert run.go({**IN_A_TOOL_CALL, "how": "terminate"}) == 130, run.output
    assert run.checkpoints()[-1] == "000019"
    run.finish()
    other_run.finish()
    is_same(run, other_run)
