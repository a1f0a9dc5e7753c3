"""The right-hand names of docs/coming-from.md are Keel's own: options of its config, columns of its rows, plug-ins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import keel
from keel import config_schema
from keel.algo import advantage, correction, losses, reduction, trust_region

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "coming-from.md"
COLUMNS = (ROOT / "docs" / "loop.md").read_text(encoding="utf-8")
PLUGINS = {name for room in (advantage, correction, losses, reduction, trust_region) for name in room.__all__}
SPOKEN = re.compile(r"`([^`]+)`")


def rows() -> list[tuple[str, str, str]]:
    """(their names, ours, the note) of every table row."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("| ") and not line.startswith("| ---") and "Keel" not in cells[1:2][0].split():
            theirs, ours, *rest = cells
            found.append((theirs, ours, rest[0] if rest else ""))
    return found


def is_known(name: str) -> bool:
    if name.startswith("keel "):
        return name.split()[1] in (ROOT / "keel" / "cli" / "program.py").read_text(encoding="utf-8")
    if name.startswith("keel."):
        return name.removeprefix("keel.") in keel.__all__
    if "/" in name:
        return f"`{name}`" in COLUMNS or name.startswith("env/")
    return config_schema.field_at(tuple(name.split("."))) is not None


def test_the_page_has_a_table_for_each_system():
    assert len(rows()) > 60


@pytest.mark.parametrize("row", rows(), ids=[row[0][:60] for row in rows()])
def test_a_name_on_the_right_is_keels(row):
    _, ours, note = row
    unknown = [name for name in SPOKEN.findall(ours) if not is_known(name)]
    assert not unknown
    plugins = [
        name
        for name in SPOKEN.findall(note)
        if name.startswith(("group_", "leave_", "token_", "sequence_", "constant_", "ppo_", "off_policy_"))
    ]
    assert set(plugins) <= PLUGINS


@pytest.mark.parametrize("name", ["rollout.group_sise", "keel.tran", "reward/mian", "keel frobnicate"])
def test_a_wrong_name_is_found(name):
    assert not is_known(name)
