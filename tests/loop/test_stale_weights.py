"""A run whose engine does not take some weights stops, and says which."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keel.loop import train
from keel.sync.check import StaleWeightsError

STALE = {"cause": "stale_tensor_group", "strength": 1.0, "group": "attention.sinks"}


def test_a_run_with_stale_weights_stops_with_their_names(tmp_path: Path, make_config) -> None:
    sections = {
        "steps": 1,
        "warm_start": {"steps": 3, "demonstrations_per_step": 4},
        "sync": {"check_every": 1},
        "engine": {"process": "separate", "distortions": [STALE]},
    }
    with pytest.raises(StaleWeightsError, match=r"attention\.sinks") as caught:
        train(make_config(tmp_path / "run", "gpt_oss", **sections))
    assert caught.value.groups == ("attention.sinks",)
    assert caught.value.exit_code == 1
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "attention.sinks" in status["reason"]


def test_a_sound_run_logs_the_check_on_its_schedule(tmp_path: Path, make_config) -> None:
    engine = {"process": "separate"}
    train(
        make_config(tmp_path / "run", "gpt_oss", steps=4, sync={"check_every": 2, "transport": "gloo"}, engine=engine)
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # The publish before the first step is number 0, that of step 0 number 1, which is always checked.
    checked = {row["step"]: row["sync/check_abs_median"] for row in rows if "sync/check_abs_median" in row}
    assert list(checked) == [0, 1, 3]
    assert max(checked.values()) <= 1e-5
