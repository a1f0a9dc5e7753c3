"""The page about the loop names every column of metrics.jsonl."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from keel.loop import train

PAGE = Path(__file__).parents[2] / "docs" / "loop.md"
ENVIRONMENTS_OWN = ("env/", "reward/")  # `env/<metric>`, `reward/<part>`


@pytest.mark.parametrize(("preset", "updates"), [("gpt_oss", 2), ("qwen3", 1)])
def test_every_column_is_named(tmp_path, make_config, preset, updates):
    algo = {"kl": {"coefficient": 0.1}, "correction": {"id": "token_truncated"}, "updates_per_batch": updates}
    config = make_config(
        tmp_path / "run",
        preset,
        model={"router": {"aux_loss_coefficient": 0.01}},
        algo=algo,
        steps=2,
        warm_start={"steps": 2, "demonstrations_per_step": 4},
        rollout={"group_size": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 20},
        eval={"num_tasks": 2},
    )
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {row.get("stage", row["kind"]) for row in rows} == {"warm_start", "reinforcement", "eval"}
    columns = {re.sub(r"layer_\d+", "layer_<n>", name) for row in rows for name in row}
    named = set(re.findall(r"`([\w/@<>]+)`", PAGE.read_text(encoding="utf-8")))
    by_k = {name.replace("<k>", "1") for name in named if "<k>" in name}  # here eval.k is 1
    missing = {name for name in columns - named - by_k if not name.startswith(ENVIRONMENTS_OWN)}
    assert not missing
    for row in (row for row in rows if row.get("stage") == "reinforcement" and row["kind"] == "step"):
        assert row["mismatch/abs_max"] < 1e-5, "over what top-p and top-k left"
        assert row["support/missing_share"] == 0.0
        assert row.get("mismatch/route_disagreement", 0.0) == 0.0
        assert row.get("routes/replayed_share", 1.0) == 1.0
    # Without what tells of a stage, there is nothing: a demonstration was drawn by nobody.
    assert not [name for row in rows if row.get("stage") == "warm_start" for name in row if "mismatch" in name]
