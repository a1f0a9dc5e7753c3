"""The tests that need a card are there, can be imported, and do not run unasked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLLECT = """
import pytest
for asked in ([], ["-m", "gpu"]):
    pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu", *asked])
    print("=====")
"""


def test_they_are_collected_when_asked_for_and_only_then():
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=ROOT, capture_output=True, text=True, check=False)
    unasked, asked, _ = done.stdout.split("=====\n")
    for name in ("test_packed_sequences", "test_the_invariants_hold", "test_the_shape_of_the_lora_recipes"):
        assert name in asked
    assert "error" not in asked.lower()
    assert "::" not in unasked
