"""Break the code on purpose, one line at a time, and demand that the test of that line fails: `make mutants`.

The list is made of TOML tables:

    [[mutant]]
    file = "keel/monitor/rules.py"
    old = "if self.skips_in_a_row >= self.max_skips:"
    new = "if self.skips_in_a_row > self.max_skips:"
    tests = ["tests/unit/monitor/test_rules.py::test_skips_in_a_row_stop_the_run"]

First all tests named must pass on the code as it is. Then every mutant gets a copy of the tree of its own. It is caught
if its tests run and fail (pytest's exit code 1); a mutant that cannot even be imported proves nothing and is an error,
as is one whose `old` text is not in the file exactly once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

COPIED = ("keel", "tests", "docs", "scripts", "pyproject.toml", "constraints.txt", "Makefile", "README.md")
COPIED += ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "benchmarks")
TESTS_FAILED = 1
TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Mutant:
    """One line of the product broken on purpose."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.file}: {' '.join(self.new.split()) or '(removed)'}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutant: "caught", "SURVIVED" or "ERROR", with the end of pytest's output."""

    mutant: Mutant
    verdict: str
    seconds: float
    detail: str = ""


def read_list(paths: Sequence[Path]) -> list[Mutant]:
    """The mutants of all files, in order. Raises ValueError for an entry that is not complete."""
    found = []
    for path in paths:
        for number, entry in enumerate(tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", []), start=1):
            if set(entry) != {"file", "old", "new", "tests"} or not entry["tests"] or entry["old"] == entry["new"]:
                raise ValueError(f"{path}: mutant {number} needs file, old, new (another text) and tests")
            found.append(Mutant(entry["file"], entry["old"], entry["new"], tuple(entry["tests"])))
    return found


def fault(mutant: Mutant, root: Path) -> str | None:
    """Why `mutant` does not fit the tree at `root`; None if it does."""
    path = root / mutant.file
    if not path.is_file():
        return f"{mutant.file} does not exist"
    count = path.read_text(encoding="utf-8").count(mutant.old)
    if count != 1:
        return f"the old text is in {mutant.file} {count} times, must be there exactly once"
    missing = [test for test in mutant.tests if not (root / test.partition("::")[0]).exists()]
    return f"no such test file: {', '.join(missing)}" if missing else None


def copy_tree(root: Path, target: Path) -> None:
    """Copy what tests need, without caches."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, ignore=ignored)
        elif (root / name).exists():
            shutil.copy(root / name, target / name)


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code of pytest (or -1 if it ran too long) and its output."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "", *tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return -1, f"not finished after {TIMEOUT_S} s"
    return done.returncode, done.stdout + done.stderr


def try_mutant(mutant: Mutant, root: Path) -> Outcome:
    """Copy the tree, break it, run the tests."""
    began = time.monotonic()
    problem = fault(mutant, root)
    if problem is not None:
        return Outcome(mutant, "ERROR", 0.0, problem)
    with tempfile.TemporaryDirectory(prefix="mutant-") as place:
        tree = Path(place)
        copy_tree(root, tree)
        path = tree / mutant.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")
        code, output = run_tests(tree, mutant.tests)
    verdict = {0: "SURVIVED", TESTS_FAILED: "caught"}.get(code, "ERROR")
    return Outcome(mutant, verdict, time.monotonic() - began, "" if verdict == "caught" else output[-2000:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the list; 0 if every mutant was caught."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("lists", nargs="+", type=Path, help="TOML files, or directories of them")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the tree to break")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("-k", dest="keep", default="", help="only mutants whose file or tests contain this text")
    options = parser.parse_args(arguments)
    files = [file for path in options.lists for file in (sorted(path.glob("*.toml")) if path.is_dir() else [path])]
    mutants = [m for m in read_list(files) if options.keep in f"{m.file} {' '.join(m.tests)}"]
    if not mutants:
        print("no mutants to try")
        return 1
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    print(f"{len(mutants)} mutants; first their {len(tests)} tests on the code as it is", flush=True)
    with tempfile.TemporaryDirectory(prefix="unbroken-") as place:
        copy_tree(options.root, Path(place))
        code, output = run_tests(Path(place), tests)
    if code != 0:
        print(f"{output[-4000:]}\nthe tests must pass before anything is broken")
        return 1
    bad = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(lambda mutant: try_mutant(mutant, options.root), mutants):
            bad += outcome.verdict != "caught"
            print(f"{outcome.verdict:9}{outcome.seconds:6.1f} s  {outcome.mutant.name}", flush=True)
            if outcome.detail:
                print("    " + outcome.detail.replace("\n", "\n    "))
    print(f"{len(mutants) - bad} of {len(mutants)} mutants caught")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
