"""The tests that need a card are there, can be imported, and do not run unasked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def collected(*arguments: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/gpu",
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


def test_they_are_collected_when_asked_for_and_only_then():
    asked = collected("-m", "gpu")
    for name in ("test_packed_sequences", "test_the_invariants_hold", "test_the_shape_of_the_lora_recipes"):
        assert name in asked
    assert "error" not in asked.lower()
    assert "::" not in collected()
