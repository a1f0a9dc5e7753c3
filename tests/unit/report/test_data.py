from __future__ import annotations

import json
import shutil
from itertools import pairwise

import pytest

from keel.monitor.rows import RunDirectoryError
from keel.report.data import report_data
from keel.report.plain import to_json
from tests.hostile import HOSTILE
from tests.report_runs import PLANS, held

KEYS = {
    "schema_version", "live", "run", "verdict", "evaluations", "series", "bands", "alarms", "invariants", "time",
    "worst_tokens", "episodes", "steps", "sampling",
}  # fmt: skip
LESS = {"budget_bytes": 1_500_000, "max_steps": 6}
"""Enough to read of a run whose whole page is not what the test is about."""


def trajectories(data):
    return {
        f"{step}/{each['trajectory']}": each
        for step, found in data["steps"].items()
        for group in found["groups"]
        for each in group["trajectories"]
    }


@pytest.fixture(scope="module")
def data_of(named_run):
    made = {}

    def data(name):
        if name not in made:
            made[name] = report_data(named_run(name), **({} if name in ("thousand", "hostile") else LESS))
        return made[name]

    return data


@pytest.mark.parametrize("name", sorted(PLANS))
def test_every_kind_of_run_has_a_whole_report_that_is_json_and_fits(data_of, name):
    data = data_of(name)
    assert set(data) == KEYS
    text = to_json(data)
    assert len(text) <= 9_500_000
    assert json.loads(text) == data
    shown = trajectories(data)
    for kind in ("best", "worst", "strangest"):
        ref = data["episodes"][kind]
        assert ref is None or (ref in shown and data["episodes"]["why"][kind])
    assert (data["episodes"]["best"] is None) == (not data["steps"])
    lengths = {len(column) for column in data["series"].values()}
    assert len(lengths) == 1


@pytest.mark.parametrize(
    ("name", "level", "words", "first_bad"),
    [
        ("thousand", "good", "Sound and learning: held-out success 2.0 % → 96.1 % (512 tasks)", None),
        ("no_records", "good", "Sound and learning", None),
        ("crashed", "bad", "Ended without a word after 138 of 300 steps", None),
        ("broken", "bad", "Stopped by the monitor after 220 of 400 steps: loss is nan", 153),
        ("empty", "bad", "No step has finished", None),
    ],
)
def test_the_verdict_of_each(data_of, name, level, words, first_bad):
    verdict = data_of(name)["verdict"]
    assert verdict["level"] == level
    assert words in verdict["text"]
    assert verdict["first_bad_step"] == first_bad


def test_a_run_that_runs_is_told_from_one_that_was_killed(named_run):
    path = named_run("running")
    assert report_data(path, budget_bytes=0)["verdict"]["level"] == "bad"
    with held(path):
        data = report_data(path, budget_bytes=0)
    assert (data["run"]["state"], data["verdict"]["level"]) == ("running", "running")


def test_a_thousand_steps_of_256_episodes_say_what_was_left_out(data_of):
    data = data_of("thousand")
    shown = trajectories(data)
    assert len(data["run"]["recorded_steps"]) == 1_000
    assert "24 of 1,000 recorded steps" in data["sampling"]
    assert f"{len(shown):,} of the 6,144 episodes" in data["sampling"]
    assert {"0", "3", "999"} <= set(data["steps"])  # the first, the alarm's, the last
    steps = sorted(map(int, data["steps"]))
    assert max(after - before for before, after in pairwise(steps)) <= 60
    assert all(found["left_out"] + sum(len(group["trajectories"]) for group in found["groups"]) == 256
               for found in data["steps"].values())  # fmt: skip
    assert all(found["groups"][0]["num_trajectories"] == 16 for found in data["steps"].values())
    assert sum(each["tokens"] is not None for each in shown.values()) > 1_000


def test_without_a_budget_nothing_is_left_out(named_run):
    data = report_data(named_run("small"), budget_bytes=None, max_steps=1)
    assert sorted(map(int, data["steps"])) == [0, 1, 2, 3]
    assert len(trajectories(data)) == 4 * 8
    assert data["sampling"] == "Everything is here: all 32 episodes of all 4 recorded steps, with their tokens."


@pytest.mark.parametrize("budget", [0, 50_000, 700_000])
def test_a_budget_is_kept(named_run, budget):
    data = report_data(named_run("running"), budget_bytes=budget, max_steps=8)
    without = to_json({**data, "steps": {}})
    assert len(to_json(data)) <= max(budget, len(without) + 6_000)


def test_an_episode_too_long_for_its_share_keeps_its_words_and_says_what_it_lost(data_of):
    cut_short = [
        each for each in trajectories(data_of("long")).values() if not each["failed"] and each["tokens"] is None
    ]
    assert cut_short
    for each in cut_short:
        assert "left out of this page for size" in each["tokens_note"]
        assert each["messages"]
        assert each["num_tokens"] > 10_000
    assert "without their tokens, for size" in data_of("long")["sampling"]


def test_a_failed_world_has_no_reward_and_no_tokens_and_is_not_of_the_batch(data_of):
    data = data_of("thousand")
    failed = [each for each in trajectories(data).values() if each["failed"]]
    assert failed
    assert {(each["reward"], each["tokens"], each["status"]) for each in failed} == {(None, None, "env_error")}
    assert "RuntimeError: the calculator is out" in failed[0]["error"]
    strip = {entry["name"]: entry for entry in data["invariants"]}
    assert strip["baseline"] == {
        "name": "baseline", "text": "no failed world counted as a reward of zero", "held": 24, "of": 24, "ok": True,
    }  # fmt: skip


def test_messages_say_who_spoke_and_which_turn_it_was(data_of):
    each = trajectories(data_of("thousand"))["999/0"]
    assert [(m["role"], m["by"], m["turn"]) for m in each["messages"]] == [
        ("user", "context", None),
        ("assistant", "policy", 0),
        ("tool", "context", 0),
        ("assistant", "policy", 1),
    ]
    assert each["messages"][1]["recipient"] == "functions.calculator"


def test_a_reply_that_could_not_be_read_is_shown_raw(data_of):
    data = data_of("thousand")
    odd = trajectories(data)[data["episodes"]["strangest"]]
    assert data["episodes"]["why"]["strangest"].startswith("a reply that could not be read")
    last = odd["messages"][-1]
    assert last["malformed"].startswith("no channel")
    assert last["content"].startswith("<|channel|>final<|message|>")


def test_evaluations_carry_their_intervals_and_pass_at_k(data_of):
    final = data_of("thousand")["evaluations"][-1]
    assert (final["name"], final["num_tasks"], final["train_step"]) == ("final", 512, 1_200)
    assert final["success_low"] < final["success"] < final["success_high"]
    assert list(final["pass_at_k"]) == ["1", "4"]
    assert final["pass_at_k"]["4"]["low"] < final["pass_at_k"]["4"]["value"]


def test_hostile_texts_are_carried_as_they_are_or_cut_with_a_word(data_of):
    data = data_of("hostile")
    contents = [message["content"] for each in trajectories(data).values() for message in each["messages"]]
    for name, text in HOSTILE.items():
        if name != "huge":
            assert any(text in content for content in contents), name
    assert any("characters left out of this page" in content for content in contents)
    assert max(map(len, contents)) < 21_000


def test_secrets_of_a_config_are_not_in_the_data(named_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(named_run("no_records"), run)
    key = "sk-" + "x9Yz" * 10
    with (run / "config.toml").open("a") as file:
        file.write(f'\n# api_key = "q1w2e3r4t5"\n# {key}\n')
    text = to_json(report_data(run))
    assert key not in text
    assert "q1w2e3r4t5" not in text


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        report_data(tmp_path)
    with pytest.raises(RunDirectoryError, match="not a directory"):
        report_data(tmp_path / "nothing")


def test_evaluations_recorded_later_are_told_of_and_change_no_verdict(named_run, tmp_path):
    run = shutil.copytree(named_run("small"), tmp_path / "run")
    before = report_data(run, **LESS)
    (run / "evaluations").mkdir()
    success = {"value": 0.25, "low": 0.125, "high": 0.5, "num_tasks": 40}
    whole = {
        "schema_version": 1,
        "name": "000006",
        "model": "run",
        "env": next(iter(HOSTILE.values())),
        "num_tasks": 40,
    }
    for number, extra in enumerate(
        ({"success": success}, {"reward": {"value": -0.5}}, {"success": "all", "unix_s": []})
    ):
        text = json.dumps({"unix_s": 10.0 - number, **whole, **extra})
        (run / "evaluations" / f"{number}.json").write_text(text)
    (run / "evaluations" / "broken.json").write_text("{")
    after = report_data(run, **LESS)
    told = [note for note in after["verdict"]["notes"] if note.startswith("Evaluated afterwards (000006): run on ")]
    assert [note.rpartition(": ")[2] for note in told] == [
        "nothing.",
        "reward -0.5.",
        "success 25.0 % (95 % interval 12.5 % to 50.0 %).",
    ]
    assert any("broken.json" in note for note in after["verdict"]["notes"])
    assert after["evaluations"] == before["evaluations"]
    assert {**after["verdict"], "notes": []} == {**before["verdict"], "notes": []}


def test_rows_and_alarms_that_are_left_out_are_stated(named_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(named_run("no_records"), run)
    row = {"schema_version": 1, "stage": "reinforcement", "reward/mean": 0.5}
    alarm = {
        "schema_version": 1,
        "kind": "alarm",
        "stage": "reinforcement",
        "rule": "r",
        "severity": "warn",
        "text": "t",
    }
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(60, 3_060):
            file.write(json.dumps({**row, "kind": "step", "step": step, "train_step": step + 41}) + "\n")
        for step in range(450):
            file.write(json.dumps({**alarm, "step": step, "train_step": step + 41, "first_step": step}) + "\n")
    data = report_data(run)
    drawn = len(data["series"]["step"])
    assert drawn < 3_100
    assert f"Curves have {drawn:,} of 3,100 rows" in data["sampling"]
    assert "Of 450 alarms the first 400 are shown." in data["sampling"]
    assert data["series"]["step"][-1] == 3_059


def test_a_key_that_a_model_or_a_world_repeats_is_not_shown(named_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(named_run("small"), run)
    key = "hf_" + "aB3d" * 8
    file = run / "trajectories" / "000003.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["prompt"][0]["content"] += key
        line["turns"][0]["observation"][0]["content"] = key
        line["error"] = f"401 for {key}"
    file.unlink()
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = to_json(report_data(run))
    assert key not in text
    assert text.count("[secret]") >= 3 * 8
