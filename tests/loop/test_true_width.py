"""One step of a slice as wide as GPT-OSS really is: `benchmarks.true_width`, whose figures are committed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.true_width import WIDTH, one_step

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "true_width.json"


@pytest.mark.soak
def test_a_step_at_true_width_is_exact_and_level(tmp_path):
    """Twelve gigabytes and a minute or two. The gap is bfloat16's: a rounding is 2**-9 of a log-prob near 10."""
    found = one_step(tmp_path / "run", attempts=4, new_tokens=8)
    assert found["policy/ratio_max_dev"] == found["policy/recompute_max_dev"] == 0.0
    assert 0 < found["mismatch/abs_mean"] < 0.02
    assert found["mismatch/abs_max"] < 0.1
    assert found["mismatch/route_disagreement"] == 0.0
    assert found["policy/grad_norm"] > 0
    assert math.isfinite(found["policy/loss"])
    assert found["learner/shared_tokens"] > 0.5 * found["learner/tokens"]
    assert found["peak_mib"] < 16 * 1024


def test_the_committed_figures_are_of_this_width():
    row = {each["figure"]: each["value"] for each in json.loads(RESULT.read_text(encoding="utf-8"))["rows"]}
    assert row["policy/recompute_max_dev"] == row["policy/ratio_max_dev"] == 0.0
    assert row["policy/grad_norm"] > 0
    layer = WIDTH["hidden_size"] * WIDTH["head_dim"] * 2 * (WIDTH["num_attention_heads"] + WIDTH["num_key_value_heads"])
    experts = WIDTH["num_local_experts"] * 3 * WIDTH["hidden_size"] * WIDTH["intermediate_size"]
    weights = 2 * (layer + experts) + 2 * 32_000 * WIDTH["hidden_size"]
    assert row["parameters"] == pytest.approx(weights, rel=0.01)
    assert row["peak_mib"] > 0
    assert row["time/step_s"] > 0
