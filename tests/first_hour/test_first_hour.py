"""A stranger's first hour, from the wheel in a clean environment: the commands of docs/first-hour.md, in their order.

The environment holds the wheel and, of this one, third parties' packages only: what the wheel lacks is missing here.
The quickstart is shortened; everything else is what a user types.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from pathlib import Path

import pytest

from tests.first_hour import page

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the working tree."""
    place = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(place)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
    (made,) = place.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory, wheel):
    """A directory with nothing in it and the commands of a fresh environment."""
    place = tmp_path_factory.mktemp("home")
    venv.create(place / "venv", with_pip=False)
    (packages,) = (place / "venv" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    # A path file inside a directory that a path file names is not read: Keel's own editable install stays unseen.
    (packages / "third_parties.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Home(place)


class Home:
    def __init__(self, place: Path) -> None:
        self.place = place
        self.python = place / "venv" / "bin" / "python"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        tools = self.python.parent
        keel = tools / "keel"  # as installers write it
        keel.write_text(f"#!{self.python}\nfrom keel.cli import main\n\nmain()\n")
        keel.chmod(0o755)
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}

    def start(self, *arguments: str, cwd: str = ".") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.python.parent / "keel"), *arguments],
            cwd=self.place / cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def keel(self, *arguments: str, cwd: str = ".", code: int = 0) -> str:
        process = self.start(*arguments, cwd=cwd)
        said, _ = process.communicate(timeout=200)
        assert process.returncode == code, said
        return said

    def shell(self, commands: str, cwd: str, exit_status: int) -> tuple[str, str]:
        """What the commands print, and the directory they leave the reader in."""
        done = subprocess.run(
            ["bash", "-c", f"trap 'pwd > {self.place}/left' EXIT\nset -eu\n{commands}"],
            cwd=self.place / cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == exit_status, done.stdout
        return done.stdout, (self.place / "left").read_text().strip()


def test_what_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "keel").rglob("*") if path.is_file()}
    wanted = {name for name in sources if "__pycache__" not in name}
    found = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert found == wanted
    assert "keel/py.typed" in found
    assert "License-Expression: Apache-2.0" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names)


STEPS = 60


def test_the_environment_is_the_wheels(home):
    where, _ = home.shell("python -c 'import keel; print(keel.__file__)'", ".", 0)
    assert Path(where.strip()).is_relative_to(home.place)


def test_the_quickstart(home):
    sets = (
        *("steps=2", "optim.warmup_steps=0", "warm_start.steps=3", "warm_start.optim.warmup_steps=0"),
        *("rollout.groups_per_step=2", "rollout.group_size=4", "eval.num_tasks=8"),
    )
    said = home.keel("quickstart", "--run-dir", "quick", *(part for one in sets for part in ("--set", one)))
    assert "held-out success final:" in said
    assert "completed: quick" in said


def test_the_page_from_its_first_command_to_its_last(home):
    files, commands = page.read(ROOT / "docs" / "first-hour.md")
    assert len(commands) >= 8
    where = "."
    for command in commands:
        for name, text in files.items():
            if (home.place / name).parent.is_dir():
                (home.place / name).write_text(text)  # `keel new` makes the directory that some of them lie in
        said, where = home.shell(command.text, where, command.exit_status)
        missing = page.first_missing(command.printed, said)
        assert missing is None, f"{command.text}did not print:\n{missing}\nbut:\n{said}"
    model_card = (home.place / "sums" / "model" / "README.md").read_text()
    assert "held-out success" in model_card.lower()
    assert 'id="keel-data"' in (home.place / "sums" / "first" / "report.html").read_text()
    assert json.loads((home.place / "sums" / "eval.json").read_text())


def test_ctrl_c_and_going_on(home):
    """Ctrl-C after the first step: the step is finished, a checkpoint is there, and the way on is told and works."""
    sets = ("run_dir=stopped", f"warm_start.steps={STEPS}", "steps=3", "eval.num_tasks=4", "checkpoint.every=0")
    process = home.start("train", "run.toml", *(part for one in sets for part in ("--set", one)), cwd="sums")
    metrics = home.place / "sums" / "stopped" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"warm_start"' in metrics.read_text()):
        time.sleep(0.05)  # until the first step is in the file
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 130, said
    assert "finishing warm_start step" in said
    assert "to go on: keel resume stopped" in said
    assert list((home.place / "sums" / "stopped" / "checkpoints").iterdir())
    assert "completed: stopped" in home.keel("resume", "stopped", cwd="sums")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "step" and row["stage"] == "warm_start"]
    assert steps == list(range(STEPS))


@pytest.mark.parametrize(
    ("transcript", "output", "missing"),
    [
        (("a 1 s", "...", "b ..."), "a 2 min 03 s\nx\nb 7 c\n", None),
        (("a 1", "b"), "b\na 2\n", "b"),
        (("c| what it read",), "c| another\n", None),
        (("done",), "done not\n", "done"),
    ],
)
def test_what_a_transcript_says_is_looked_for_in_order(transcript, output, missing):
    assert page.first_missing(transcript, output) == missing
