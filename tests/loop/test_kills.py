"""A run killed at any moment and resumed leaves what the undisturbed run leaves: weights, rows, records, to the bit.

The runs are whole ones: a start model is built, warmed up by demonstrations, and trained by reinforcement with a tool,
with four evaluations and eleven checkpoints. Aims are explained in killing.py.
"""

from __future__ import annotations

import random
import shutil
import signal

import pytest

SAVES_IN_WARM_START = 8
# One publication before the first step, then one a step: the third reinforcement step's is this one.
THIRD_STEP = {"train_step": 16 + 3, "publish": 1 + 16 + 3, "append_row": 2 + 16 + 3}

AT_SAVE = {
    "before_the_rename_of_a_checkpoint": {"at": "pathlib:Path.rename", "match": "000018.unfinished'), PosixPath"},
    "after_the_rename_of_a_checkpoint": {
        "at": "pathlib:Path.rename",
        "match": "000018.unfinished'), PosixPath",
        "how": "after",
    },
    "in_the_tensors_of_a_checkpoint": {"at": "keel.learner.state:save_file", "call": 9, "how": "torn"},
    "before_the_manifest_of_a_checkpoint": {"at": "pathlib:Path.write_text", "match": "manifest", "call": 9},
    "in_the_removal_of_an_old_checkpoint": {
        "at": "shutil:rmtree",
        "match": "000014.unfinished",
        "armed_by": ["keel.build:prune", 9],
    },
}
AT_STEP = {
    "in_a_tool_call": {"at": "keel.envs.tools:Tool.call", "call": 2, "armed_by": ["keel.loop:train_step", 19]},
    "between_backward_and_optimizer": {"at": "keel.learner.learner:Learner.apply", "call": THIRD_STEP["train_step"]},
    "between_optimizer_and_publish": {"at": "keel.build:Parts.publish", "call": THIRD_STEP["publish"]},
    "between_publish_and_records": {"at": "keel.loop:write_records", "call": THIRD_STEP["train_step"]},
    "between_the_two_records": {"at": "keel.records:write_trajectories", "call": 3},
    "between_records_and_row": {"at": "keel.monitor.runlog:RunLog.log_step", "call": THIRD_STEP["train_step"]},
    "in_a_row": {"at": "keel.monitor.runlog:append_row", "call": THIRD_STEP["append_row"], "how": "torn"},
    "between_row_and_status": {
        "at": "keel.monitor.runlog:append_row",
        "call": THIRD_STEP["append_row"],
        "how": "after",
    },
    "in_the_status": {"at": "pathlib:Path.replace", "match": "status.json", "call": 30},
}
AT_BORDERS = {
    "before_the_config": {"at": "keel.monitor.runlog:write_text"},
    "before_the_environment": {"at": "keel.monitor.runlog:write_json", "match": "environment.json"},
    "in_the_start_model": {"at": "transformers:PreTrainedTokenizerFast.save_pretrained"},
    "before_the_start_model_has_its_name": {"at": "keel.tiny_start:build_tiny_model", "how": "after"},
    "before_the_first_checkpoint": {"at": "keel.monitor.runlog:RunLog.log_step", "how": "after"},
    "in_an_evaluation": {"at": "keel.envs.tools:Tool.call", "call": 3, "armed_by": ["keel.loop:measure_tasks", 3]},
    "between_evaluation_and_checkpoint": {"at": "keel.build:Parts.save", "call": SAVES_IN_WARM_START},
    "between_the_stages": {"at": "keel.learner.learner:Learner.enter", "call": 17},
    "before_the_summary": {"at": "keel.monitor.runlog:RunLog.close"},
    "between_summary_and_last_status": {
        "at": "keel.monitor.runlog:write_json",
        "match": "summary.json",
        "how": "after",
    },
}
# Of a resumed run; it was killed with the records of its third reinforcement step written and its row not.
AT_RESUME = {
    "before_the_checkpoint_is_read": {"at": "keel.build:checkpoint_to_resume"},
    "after_the_checkpoint_is_read": {"at": "keel.learner.learner:Learner.load", "how": "after"},
    "before_later_rows_are_cut": {"at": "keel.monitor.runlog:truncate_rows"},
    "after_later_rows_are_cut": {"at": "keel.monitor.runlog:truncate_rows", "how": "after"},
    "in_the_removal_of_later_records": {"at": "pathlib:Path.unlink", "match": "000002.jsonl"},
    "before_the_first_step": {"at": "keel.loop:run_stages"},
}


def cases(aims):
    return [pytest.param(aim, id=name) for name, aim in aims.items()]


def test_killed_three_times(run, same_as_undisturbed):
    """In a tool call of reinforcement; in the same run, resumed, in a row; resumed, at the rename of a checkpoint."""
    run.die(AT_STEP["in_a_tool_call"])
    run.die({"at": "keel.monitor.runlog:append_row", "call": 2, "how": "torn"})
    assert not (run.path / "metrics.jsonl").read_bytes().endswith(b"\n")
    run.die({"at": "pathlib:Path.rename", "match": "000020.unfinished'), PosixPath"})
    assert "000020.unfinished" in run.checkpoints()
    run.finish()
    same_as_undisturbed(run)


@pytest.mark.soak
@pytest.mark.parametrize("aim", cases(AT_SAVE | AT_STEP | AT_BORDERS))
def test_killed(run, same_as_undisturbed, aim):
    run.die(aim)
    run.finish()
    same_as_undisturbed(run)


@pytest.mark.soak
@pytest.mark.parametrize("aim", cases(AT_RESUME))
def test_killed_while_resuming(run, same_as_undisturbed, aim):
    run.die(AT_STEP["between_records_and_row"])
    run.die(aim)
    run.finish()
    same_as_undisturbed(run)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_random_times(run, undisturbed, same_as_undisturbed, seed):
    """Killed at any time of its life, the start of the process included, and perhaps once more when resumed."""
    draw = random.Random(seed)
    share = draw.uniform(0.1, 1.0)
    while run.go(killed_after_s=share * undisturbed.seconds) != -signal.SIGKILL:
        shutil.rmtree(run.path)  # the machine was quicker this time
        share /= 2
    run.go(killed_after_s=draw.uniform(0.1, 1.0) * undisturbed.seconds)
    run.finish()
    same_as_undisturbed(run)


SETTINGS = {
    "two_threads": ("num_threads=2",),
    "bfloat16_reference_and_two_updates": (
        'model.dtype="bfloat16"',
        "algo.kl.coefficient=0.1",
        "algo.updates_per_batch=2",
    ),
    "arithmetic": ('env.id="CalculatorEnv"', "env.options={num_tasks=300}", "rollout.max_sequence_tokens=192"),
    "qwen3_moe": ('model.tiny={preset="qwen3_moe", vocab_size=320, options={num_hidden_layers=2}}',),
}


@pytest.mark.soak
@pytest.mark.parametrize("sets", cases(SETTINGS))
def test_killed_in_other_settings(run, other_run, is_same, sets):
    run.sets = other_run.sets = sets
    run.die(AT_STEP["between_publish_and_records"])
    run.finish()
    other_run.finish()
    is_same(run, other_run)
