"""docs/benchmarks.md says what the committed figures say, and nothing in them becomes markup."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmarks_page", ROOT / "scripts" / "benchmarks_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_figures_say(script):
    written = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert written == script.page(), "run: python scripts/benchmarks_page.py"


def test_every_committed_comparison_says_how_it_was_made(script):
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(result, dict) and result.keys() >= script.SHAPE:
            assert result["command"], path
            assert result["machine"]["packages"]["torch"], path
            for row in result["rows"]:
                if "ratio" in row:
                    assert row["low"] <= row["ratio"] <= row["high"], (path, row)


RESULT = {
    "benchmark": "made up",
    "command": "keel bench made-up",
    "machine": {"cpu": "a | b", "cpu_usable": 2, "threads": 2, "packages": {"torch": "2"}, "load": [0.5], "gpu": None},
    "notes": ["one <b>note</b>"],
    "rows": [
        {"case": "a|b", "peer": "other", "ours_ms": 1234.5, "peer_ms": 2.345, "ratio": 1.5, "equal_to": 2e-7},
        {"case": "c", "peer": "other", "ours_ms": 12.34, "peer_ms": None, "ratio": 0.5, "equal_to": 0.0},
        {"case": "d", "operator": "mm"},
    ],
}


def write(tmp_path, **changes):
    (tmp_path / "made_up.json").write_text(json.dumps({**RESULT, **changes}), encoding="utf-8")
    (tmp_path / "other.json").write_text(json.dumps({"runs": []}), encoding="utf-8")


def test_a_result_becomes_a_section_with_a_table_for_each_kind_of_row(script, tmp_path):
    write(tmp_path)
    told = script.page(tmp_path)
    assert "## made up" in told
    assert "| case | ours (ms) | peer (ms) | ratio | equal to |" in told
    assert "peer: other" in told  # shared by all rows of its table: no column of its own
    assert "| a\\|b | 1,234 | 2.35 | 1.50 | 2.0e-07 |" in told
    assert "| c | 12.3 | - | 0.50 | 0.00 |" in told
    assert "| case | operator |\n| --- | --- |\n| d | mm |" in told
    assert "```text\nkeel bench made-up\n```" in told
    assert "<b>" not in told
    assert "- [other.json](../benchmarks/results/other.json)" in told


def test_the_page_says_that_no_gpu_was_there_as_long_as_no_figure_is_of_one(script, tmp_path):
    write(tmp_path)
    assert script.NO_GPU in script.page(tmp_path)
    write(tmp_path, machine={**RESULT["machine"], "gpu": "a card"})
    assert script.NO_GPU not in script.page(tmp_path)
    assert "On a card" in script.page(tmp_path)
