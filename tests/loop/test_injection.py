"""A real run in which hostile strings are all they can be: on the terminal, on disk and in a page they stay text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

import keel
from keel.models.tiny import build_tiny_model, build_tiny_tokenizer
from keel.report import write_report
from keel.rollouts.metrics import column_name
from keel.rollouts.store import read_trajectories
from keel.runs import load_run
from tests.hostile import HOSTILE, MARK, SMALL

HERE = Path(__file__).parent
ROOT = Path(keel.__file__).parents[1]
RUN_NAME = "\x1b]0;title\x07<img src=x onerror=alert(1)> \u202e[red]%s{{7*7}} 'quoted\"'"

CONFIG = """
steps = 1
num_threads = 1
seed = 5
env = {{ id = "hostile_world:Hostile" }}
model = {{ path = {model} }}
chat = {{ system_message = "none" }}
engine = {{ id = "hostile_world:Parrot" }}
sync = {{ check_every = 0 }}
eval = {{ num_tasks = 4 }}
batch = {{ max_tokens = 4096 }}
learner = {{ recompute_every = 0 }}
rollout = {{ groups_per_step = {groups}, group_size = 2, max_new_tokens = 400, max_sequence_tokens = 2000 }}
"""
EXPECTED = re.compile(
    r"\.lock|config\.toml|environment\.json|status\.json|summary\.json|metrics\.jsonl|report\.html|"
    r"steps/000000\.safetensors|trajectories/000000\.jsonl|sources/[\w.-]+\.(json|py)|"
    r"checkpoints/000001/(manifest\.json|learner\.json|learner\.safetensors|weights/[\w.-]+)"
)


def run_keel(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE))), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "keel", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, check=False)
    out, err = (text.decode("utf-8") for text in (done.stdout, done.stderr))  # with every control character as it is
    return subprocess.CompletedProcess(command, done.returncode, out, err)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The directory of a run that has seen every string, and what its command printed."""
    place = tmp_path_factory.mktemp("hostile")
    build_tiny_model("gpt_oss", place / "model", tokenizer=build_tiny_tokenizer(["Go."], style="harmony"), seed=0)
    config = CONFIG.format(model=json.dumps(str(place / "model")), groups=len(HOSTILE))
    (place / "run.toml").write_text(f"run_dir = {json.dumps(str(place / RUN_NAME))}\n{config}", encoding="utf-8")
    before = set(place.iterdir())
    done = run_keel("train", "run.toml", cwd=place)
    assert done.returncode == 0, done.stderr
    assert set(place.iterdir()) - before == {place / RUN_NAME}
    return place / RUN_NAME, done


def acting(text: str) -> set[str]:
    """Characters that do something to a terminal, or hide or reorder what is shown."""
    hidden = {char for char in set(text) - {"\n", "\t"} if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    return hidden


def test_the_terminal_gets_nothing_to_obey(world):
    run_dir, done = world
    assert acting(done.stdout) | acting(done.stderr) == set()
    assert "completed: " in done.stdout
    listed = run_keel("report", str(run_dir), "--out", "page.html", cwd=run_dir.parent)
    assert listed.returncode == 0, listed.stderr
    assert acting(listed.stdout) | acting(listed.stderr) == set()


def test_no_file_is_where_a_name_would_have_it(world):
    run_dir, _ = world
    files = [str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()]
    assert [name for name in files if not EXPECTED.fullmatch(name)] == []
    assert not Path(f"/tmp/{MARK}").exists()


def test_records_read_back_to_the_same_strings(world):
    run_dir, _ = world
    trajectories = read_trajectories(run_dir / "trajectories" / "000000.jsonl")
    assert len(trajectories) == 2 * len(HOSTILE)
    seen = {trajectory.task.data["name"] for trajectory in trajectories}
    assert seen == set(HOSTILE)
    for trajectory in trajectories:
        name = trajectory.task.data["name"]
        assert trajectory.task.id == SMALL.get(name, name)
        assert trajectory.task.data["text"] == HOSTILE[name]
        assert trajectory.prompt[0].content == SMALL.get(name, "Go.")
        if trajectory.turns and trajectory.turns[0].observation:
            assert trajectory.turns[0].observation[0].content == HOSTILE[name]
        if trajectory.status == "env_error" and "prompt has" not in trajectory.error:
            assert HOSTILE[name] in trajectory.error
    assert {"env_error", "completed"} <= {trajectory.status for trajectory in trajectories}


def test_rows_are_json_and_their_names_are_names(world):
    run_dir, _ = world
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["kind"] for row in rows if row["kind"] in ("step", "eval")] == ["eval", "step", "eval"]
    step = next(row for row in rows if row["kind"] == "step")
    assert all(re.fullmatch(r"[\w.+@%=:/~ -]{1,100}", name) for name in step)
    shown = [name for name in HOSTILE if column_name("env", HOSTILE[name]) in step]
    assert len(shown) >= len(HOSTILE) - 3  # but for those whose every attempt failed


class Elements(HTMLParser):
    """Counts elements and attributes, and collects the texts of scripts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.counts: Counter[str] = Counter()
        self.scripts: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.counts.update(f"{tag}@{name}" for name, _ in attrs)
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data


def elements_of(page: Path) -> Elements:
    found = Elements()
    found.feed(page.read_text(encoding="utf-8"))
    found.close()
    return found


def test_a_page_of_the_run_has_no_element_more_and_the_same_strings(world, tmp_path):
    run_dir, _ = world
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.toml").write_text("steps = 1\n")
    plain = elements_of(write_report(tmp_path / "plain", tmp_path / "plain.html"))
    page = elements_of(write_report(run_dir, tmp_path / "page.html"))
    assert page.counts == plain.counts
    (data,) = [json.loads(text) for text in page.scripts if text.lstrip().startswith("{")]
    texts: set[str] = set()

    def walk(value: object) -> None:
        if isinstance(value, str):
            texts.add(value)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(data)
    shown = {trajectory.task.id for trajectory in load_run(run_dir).trajectories(0)}
    kept = [text for text in shown if text in texts]
    assert len(kept) > 10  # a page shows a sample of the episodes; what it shows is what was said
    assert any(RUN_NAME in text for text in texts)


def test_an_episode_shown_is_only_text(world):
    run_dir, _ = world
    done = run_keel(
        "rollout",
        "run.toml",
        "-n",
        "8",
        "--show",
        "--no-learner",
        "--set",
        "rollout.groups_per_step=4",
        cwd=run_dir.parent,
    )
    assert done.returncode == 0, done.stderr
    assert "p> <|channel|>final<|message|>" in done.stdout
    assert acting(done.stdout) | acting(done.stderr) == set()
