"""docs/papers.md: every option of it can be set, and every test it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from keel.config_load import parse

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs" / "papers.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| ---", "| method"))
]
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


def test_the_page_has_its_table():
    assert len(ROWS) > 20
    assert all(len(row) == 3 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:50] for row in ROWS])
def test_the_options_of_a_method_are_a_config(row):
    for option in re.findall(r"`([a-z_.]+) = ([^`]+)`", row[1]):
        parse(f'env.id = "CalculatorEnv"\n{option[0]} = {option[1]}\n')


@pytest.mark.parametrize("row", ROWS, ids=[row[0][:50] for row in ROWS])
def test_the_tests_of_a_method_are_there(row):
    named = re.findall(r"`([\w/.]+)`", row[2])
    assert named or row[2] == "the same"
    for name in named:
        assert f"def {name}(" in TESTS if name.startswith("test_") else (ROOT / name).is_file()
