from __future__ import annotations

import shutil

from keel.config import TrainConfig
from keel.monitor.bands import bands
from keel.report.invariants import from_rows, no_failed_world_is_zero, records_whole
from keel.runs import load_run

FLOAT32 = bands(TrainConfig())


def strip(rows, updates=1):
    return {
        entry["name"]: (entry["held"], entry["of"], entry["ok"])
        for entry in from_rows(rows, FLOAT32, updates_per_batch=updates)
    }


def test_every_step_that_holds_is_counted(make_rows):
    rows = make_rows(40)
    assert strip(rows) == dict.fromkeys(("ratio", "finite", "recompute", "mismatch", "taken", "rows"), (40, 40, True))
    rows[3]["policy/ratio_max_dev"] = 1e-12
    rows[4]["policy/recompute_max_dev"] = None  # not finite: measured, and not held
    rows[4]["not_finite"] = {"policy/recompute_max_dev": "inf"}
    rows[5]["mismatch/abs_mean"] = 2e-5
    rows[6]["policy/skipped"] = 1.0
    del rows[7]["policy/recompute_max_dev"]  # unchecked: not of those counted
    found = strip(rows)
    assert found["ratio"] == found["finite"] == found["mismatch"] == found["taken"] == (39, 40, False)
    assert found["recompute"] == (38, 39, False)


def test_with_several_updates_the_ratio_is_no_invariant(make_rows):
    assert "ratio" not in strip(make_rows(5), updates=2)


def test_a_missing_and_a_doubled_row_are_seen(make_rows):
    rows = make_rows(10)
    assert strip(rows[:4] + rows[5:])["rows"] == (8, 9, False)
    assert strip(rows[:5] + rows[4:])["rows"] == (10, 11, False)


def test_failed_worlds_must_add_up(make_rows):
    parts = {"rollout/env_error": 1.0, "rollout/env_timeout": 2.0, "rollout/engine_error": 0.0}
    rows = make_rows(4, **{"rollout/failed": lambda step: 3.0 if step else 2.0, **parts})
    assert strip(rows)["failed"] == (3, 4, False)


def test_records_are_as_long_as_they_say(named_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(named_run("running"), run)
    assert records_whole(load_run(run)) == {
        "name": "records",
        "text": "records whole",
        "held": 138,
        "of": 138,
        "ok": True,
    }
    record = run / "steps" / "000005.safetensors"
    record.write_bytes(record.read_bytes()[:-1])
    (run / "steps" / "000006.safetensors").write_bytes(b"\xff" * 64)
    (run / "steps" / "000007.safetensors").unlink()
    text = run / "trajectories" / "000008.jsonl"
    text.write_bytes(text.read_bytes()[:-1])
    (run / "trajectories" / "000009.jsonl").write_bytes(b"")
    assert records_whole(load_run(run))["held"] == 133


def test_the_strip_of_records_tells_how_many_were_looked_at():
    assert no_failed_world_is_zero([True, True, False])["held"] == 2
