"""The list of mutants fits the code, and its runner tells a caught mutant from one that survives or proves nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("mutants", ROOT / "scripts" / "mutants.py")
assert spec is not None
assert spec.loader is not None
mutants = importlib.util.module_from_spec(spec)
sys.modules["mutants"] = mutants  # dataclasses look their module up
spec.loader.exec_module(mutants)

LISTED = mutants.read_list(sorted((ROOT / "tests" / "mutants").glob("*.toml")))


@pytest.mark.parametrize("mutant", LISTED, ids=[mutant.name for mutant in LISTED])
def test_every_listed_mutant_fits_the_code(mutant):
    assert mutants.fault(mutant, ROOT) is None


@pytest.fixture
def project(tmp_path):
    (tmp_path / "keel").mkdir()
    (tmp_path / "keel" / "__init__.py").write_text("")
    (tmp_path / "keel" / "double.py").write_text("def double(x):\n    return x + x\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_double.py").write_text(
        "from keel.double import double\n\ndef test_four():\n    assert double(2) == 4\n"
    )
    return tmp_path


def entry(new, *, old="x + x"):
    return f'[[mutant]]\nfile = "keel/double.py"\nold = "{old}"\nnew = "{new}"\ntests = ["tests/test_double.py"]\n'


@pytest.mark.parametrize(
    ("new", "old", "verdict", "code"),
    [
        ("x + 1", "x + x", "caught", 0),
        ("x * x", "x + x", "SURVIVED", 1),
        ("x +", "x + x", "ERROR", 1),  # cannot be imported: no test has run
        ("y", "x", "ERROR", 1),  # stands there more than once
        ("y", "z", "ERROR", 1),  # does not stand there
    ],
)
def test_the_runner_tells_them_apart(project, capsys, new, old, verdict, code):
    (project / "list.toml").write_text(entry(new, old=old))
    assert mutants.main([str(project / "list.toml"), "--root", str(project), "--jobs", "1"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "keel/double.py: " in line] == [verdict]
    assert "x + x" in (project / "keel" / "double.py").read_text()


def test_nothing_is_broken_before_the_tests_pass(project, capsys):
    (project / "keel" / "double.py").write_text("def double(x):\n    return x + x + 1\n")
    (project / "list.toml").write_text(entry("x + 1", old="x + x"))
    assert mutants.main([str(project / "list.toml"), "--root", str(project)]) == 1
    assert "must pass before" in capsys.readouterr().out


def test_an_incomplete_entry_is_refused(project):
    (project / "list.toml").write_text('[[mutant]]\nfile = "keel/double.py"\n')
    with pytest.raises(ValueError, match="mutant 1 needs"):
        mutants.read_list([project / "list.toml"])
