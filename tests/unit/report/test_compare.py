from __future__ import annotations

import json
import shutil

import pytest

from keel.report.compare import compare_data
from keel.report.plain import to_json


@pytest.fixture
def pair(named_run, tmp_path):
    """The same small run twice, to be bent."""
    paths = [tmp_path / name for name in ("first", "second")]
    for path in paths:
        shutil.copytree(named_run("small"), path)
    return paths


def change_rows(path, change):
    file = path / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        change(row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_equal_runs_are_equal_to_the_last_digit(pair):
    data = compare_data(*pair)
    assert data["config"] == []
    assert data["divergence"]["first"] is None
    assert data["divergence"]["token"] is None
    assert (data["divergence"]["same_seed"], data["divergence"]["rows_compared"]) == (True, 6)
    assert data["divergence"]["text"] == "Equal in every number, to the last digit, on all 6 steps that both have."
    assert data["summary"].startswith(
        "The configs are the same. Held-out success final: 93.0 % against 93.0 %, no difference shown"
    )
    assert data["series"]["a"] == data["series"]["b"]
    assert json.loads(to_json(data)) == data


def test_times_speeds_and_memory_do_not_set_runs_apart(pair):
    def slower(row):
        row["unix_s"] += 1000.0
        row["memory/resident_mib"] = row["unix_s"]
        for name in row:
            if name.startswith("time/") or name == "rollout/tokens_per_s":
                row[name] *= 2

    change_rows(pair[0], lambda row: row.update({"memory/resident_mib": 1.0}))
    change_rows(pair[1], slower)
    assert compare_data(*pair)["divergence"]["first"] is None


def test_the_first_row_that_differs_is_found_however_little_it_differs(pair):
    def bend(row):
        if row.get("stage") == "reinforcement" and row["step"] >= 2:
            row["policy/loss"] += 1e-16
            row["policy/entropy"] *= 2

    change_rows(pair[1], bend)
    found = compare_data(*pair)["divergence"]
    assert (found["first"]["stage"], found["first"]["step"], found["first"]["train_step"]) == ("reinforcement", 2, 5)
    assert [each["metric"] for each in found["first"]["metrics"]] == ["policy/loss", "policy/entropy"]
    assert found["first"]["metrics"][0]["a"] != found["first"]["metrics"][0]["b"]
    assert "Equal up to step 2" in found["text"]


def test_the_first_token_that_differs_is_found_in_the_records(pair):
    from keel.rollouts.store import read_step_record, write_step_record

    def bend(row):
        if row.get("stage") == "reinforcement" and row["step"] >= 3:
            row["policy/loss"] += 1.0

    change_rows(pair[1], bend)
    path = pair[1] / "steps" / "000003.safetensors"
    streams, header = read_step_record(path)
    row = int(streams["cu_seqlens"][1]) + 4  # the fifth label of the second sequence: token 5 of attempt 1
    streams["labels"] = streams["labels"].copy()
    streams["labels"][row] = 7
    path.unlink()
    write_step_record(path, streams, {"step": header["step"]})
    token = compare_data(*pair)["divergence"]["token"]
    assert (token["step"], token["trajectory"], token["attempt"], token["position"]) == (3, 1, 1, 5)
    assert token["b"]["id"] == 7
    assert token["a"]["id"] != 7
    assert token["a"]["text"]
    assert token["before"].endswith("user<|message|>") or "<|message|>" in token["before"]


def test_other_seeds_differ_from_the_start_and_that_is_said(named_run):
    data = compare_data(named_run("running"), named_run("other_seed"))
    options = {option["option"]: (option["a"], option["b"]) for option in data["config"]}
    assert options["seed"] == ("0", "1")
    assert options["optim.lr"] == ("0.0001", "0.0005")
    assert not {"run_dir", "name"} & set(options)
    assert data["divergence"]["first"]["train_step"] == 1
    assert "Their seeds differ, so nothing else was to be expected." in data["divergence"]["text"]
    assert data["divergence"]["token"]["step"] == 0


def test_evaluations_are_compared_with_the_interval_of_their_difference(named_run):
    data = compare_data(named_run("no_records"), named_run("thousand"))
    rows = {row["name"]: row for row in data["evaluations"]}
    assert rows["step_250"]["a"] is None
    assert (rows["step_250"]["difference"], rows["step_250"]["text"]) == (None, "only one run has it")
    final = rows["final"]["difference"]
    assert final["value"] == pytest.approx(rows["final"]["b"]["success"] - rows["final"]["a"]["success"], abs=1e-6)
    assert final["low"] < final["value"] < final["high"]
    assert final["differs"] == (final["low"] > 0)
    figures = {row["metric"]: row for row in data["figures"]}
    assert figures["reward/mean"]["a"] > 0.5
    assert figures["time/step_s"]["b"] > 2


def test_a_run_without_steps_has_nothing_to_part_at(named_run):
    data = compare_data(named_run("empty"), named_run("small"))
    assert data["divergence"]["rows_compared"] == 0
    assert "cannot be said" in data["divergence"]["text"]


def test_secrets_of_configs_are_not_compared_in_the_open(pair):
    config = pair[1] / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("[env]\n", '[env]\nnote = "hf_' + "aB3d" * 8 + '"\n', 1))
    written = to_json(compare_data(*pair))
    assert "hf_aB3d" not in written
    assert '"env.note"' in written
