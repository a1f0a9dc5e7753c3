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
        self.environment = {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}

    def start(self, *arguments: str, cwd: str = ".") -> subprocess.Popen[str]:
        command = [str(self.python), "-P", "-c", "from keel.cli import main; main()", *arguments]
        return subprocess.Popen(
            command,
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

    def run(self, program: str, *, cwd: str = ".") -> str:
        done = subprocess.run(
            [self.python, "-c", program],
            cwd=self.place / cwd,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


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


def test_the_environment_is_the_wheels(home):
    assert Path(home.run("import keel; print(keel.__file__)").strip()).is_relative_to(home.place)


def test_the_quickstart(home):
    sets = (
        *("steps=2", "optim.warmup_steps=0", "warm_start.steps=3", "warm_start.optim.warmup_steps=0"),
        *("rollout.groups_per_step=2", "rollout.group_size=4", "eval.num_tasks=8"),
    )
    said = home.keel("quickstart", "--run-dir", "quick", *(part for one in sets for part in ("--set", one)))
    assert "held-out success final:" in said
    assert "completed: quick" in said


def test_the_first_hour_on_own_rows(home):
    rows = [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(20) for b in range(10)]
    assert len(rows) == 200
    (home.place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    home.keel("new", "sums", "--data", "rows.jsonl")

    said = home.keel("rollout", "run.toml", "-n", "16", "--set", "warm_start.steps=20", "--show", cwd="sums")
    assert "groups whose rewards differ" in said
    assert "What is " in said

    said = home.keel("train", "run.toml", "--set", "rollout.group_sise=4", cwd="sums", code=2)
    assert "--set rollout.group_sise=4" in said
    assert "did you mean 'group_size'?" in said or 'did you mean "group_size"?' in said

    train_until_stopped(home)
    said = home.keel("resume", "first", cwd="sums", code=0)
    assert "completed: first" in said
    rows = [json.loads(line) for line in (home.place / "sums/first/metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "step" and row["stage"] == "warm_start"]
    assert steps == list(range(MANY_FEWER))

    home.keel("report", "first", cwd="sums")
    assert "keel-data" in (home.place / "sums/first/report.html").read_text()
    said = home.keel("eval", "first", "-n", "10", "--attempts", "2", "--k", "1,2", "--json", "eval.json", cwd="sums")
    assert "pass@2" in said
    assert json.loads((home.place / "sums/eval.json").read_text())["num_tasks"] == 10
    home.keel("export", "first", "--out", "model", cwd="sums")
    assert (home.place / "sums/model/README.md").is_file()
    generated = home.run(
        "import sys; sys.modules['keel'] = None\n"  # what is exported needs nothing of Keel's
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained('model')\n"
        "model = AutoModelForCausalLM.from_pretrained('model')\n"
        "prompt = '<|start|>user<|message|>What is 3 + 4?<|end|><|start|>assistant'\n"
        "inputs = tokenizer(prompt, return_tensors='pt', add_special_tokens=False)\n"
        "drawn = model.generate(**inputs, max_new_tokens=8, do_sample=False)\n"
        "print(tokenizer.decode(drawn[0, inputs['input_ids'].shape[1]:]))\n",
        cwd="sums",
    )
    assert "<|message|>" in generated  # it has learned how an answer looks


MANY_FEWER = 60


def train_until_stopped(home: Home) -> None:
    """Ctrl-C after the first steps: the step is finished, a checkpoint is there, and the way on is told."""
    sets = ("run_dir=first", f"warm_start.steps={MANY_FEWER}", "steps=3", "eval.num_tasks=4", "checkpoint.every=0")
    process = home.start("train", "run.toml", *(part for one in sets for part in ("--set", one)), cwd="sums")
    metrics = home.place / "sums" / "first" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"warm_start"' in metrics.read_text()):
        time.sleep(0.05)  # until the first step is in the file
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 130, said
    assert "keel resume first" in said
    assert list((home.place / "sums" / "first" / "checkpoints").iterdir())
