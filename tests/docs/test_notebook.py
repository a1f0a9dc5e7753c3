"""The first hour in a notebook, executed headless: objects of its cells instead of files."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import keel

ROOT = Path(keel.__file__).parents[1]
HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e"

OBJECTS = f'''
import asyncio
import keel

asyncio.get_running_loop()  # a cell runs inside one
HOSTILE = {HOSTILE!r}
WORDS = ["red", "green", "blue", "grey"]

def heard(reply):
    return (reply.final or "").strip()

class Echo(keel.Env):
    """Wants to hear a colour."""

    def tasks(self, split):
        return [keel.Task(f"{{split}} {{word}}", {{"word": word}}) for word in WORDS]

    def reset(self, task):
        self.word = task.data["word"]
        return [keel.Message("user", f"Say {{self.word}}, not {{HOSTILE}}.")]

    async def step(self, reply):
        right = heard(reply) == self.word
        return keel.Step(done=True, reward=float(right), success=right)

def brevity(trajectory, task):
    return -0.01 * len(trajectory.turns[-1].reply_text)

def policy_gradient(inputs):
    return -inputs.required_advantages() * inputs.logprobs, {{"advantage": inputs.required_advantages()}}
'''

CONFIG = """
config = {
    "steps": 2,
    "num_threads": 1,
    "run_dir": "run",
    "model": {"tiny": {"preset": "gpt_oss", "vocab_size": 320, "options": {
        "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4, "head_dim": 16}}},
    "chat": {"system_message": "none"},
    "rollout": {"groups_per_step": 2, "group_size": 4, "max_turns": 1, "max_new_tokens": 12,
                "max_sequence_tokens": 160},
    "engine": {"slots": 8},
    "eval": {"num_tasks": 4},
}
objects = {"env": Echo, "reward": brevity}
"""

REFUSED = """
try:
    keel.train({**config, "run_dir": "ranks", "learner": {"ranks": 2}}, **objects, loss=policy_gradient)
except keel.plugins.PluginError as error:
    print(error)
"""

OWN_DATA = """
rows = [{"question": f"What is {n} and 1?", "answer": str(n + 1)} for n in range(20)]
own = keel.task_env(rows, reward="exact_match")
keel.rollout({**config, "model": {"path": str(run.weights())}}, env=own, num_tasks=1, with_learner=False)
"""

EXPORTED = """
from keel.export import export_run
from transformers import AutoModelForCausalLM
exported = export_run(run)
model = AutoModelForCausalLM.from_pretrained(exported.path)
print(model.generate(input_ids=model.dummy_inputs["input_ids"][:1] % 300, max_new_tokens=3, do_sample=False).shape)
exported
"""

RESUMED = """
text = run.config_text.replace("steps = 2 ", "steps = 3 ", 1)
(run.path / "config.toml").write_text(text)
keel.resume(run.path, **objects, loss=policy_gradient)
"""

CELLS = {
    "objects": OBJECTS,
    "config": CONFIG,
    "rollout": "keel.rollout(config, **objects, num_tasks=2)",
    "refused": REFUSED,
    "train": "keel.train(config, **objects, loss=policy_gradient)",
    "run": 'run = keel.load_run("run")\nrun',
    "record": "run.step(1)",
    "evaluate": "keel.evaluate(run, **objects, num_tasks=3, attempts=2)",
    "report": "print(keel.report.write_report(run.path))",
    "export": EXPORTED,
    "own data": OWN_DATA,
    "resumed": RESUMED,
}
ELEMENTS = "div strong b p pre table tbody tr th td span ul li details summary code br small"
SHOWN = ("rollout", "train", "run", "record", "evaluate", "export", "own data", "resumed")


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> tuple[Path, dict[str, list]]:
    """The directory of the executed notebook, and the outputs of its cells."""
    path = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text.strip()) for text in CELLS.values()])
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(path / "ipython")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**own, "JUPYTER_RUNTIME_DIR": str(path / "runtime")}.items():
            patch.setenv(name, value)
        client = NotebookClient(
            notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(path)}}
        )
        client.execute(env=os.environ)
    return path, {name: cell.outputs for name, cell in zip(CELLS, notebook.cells, strict=True)}


def printed(outputs: list) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


class Tags(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("cell", SHOWN)
def test_a_result_shows_itself_and_no_foreign_text_becomes_markup(executed, cell):
    results = [output for output in executed[1][cell] if output.output_type == "execute_result"]
    (result,) = results
    page = Tags(result.data["text/html"])
    assert page.tags <= set(ELEMENTS.split())
    assert page.attributes <= {"style", "class", "title", "colspan"}
    assert len(page.text) > 50
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text


def test_the_run_knows_its_objects_and_has_their_cell(executed):
    path, _ = executed
    run = keel.load_run(path / "run")
    assert run.state == "completed"
    assert (run.config.env.id, run.config.env.reward.id) == ("__main__:Echo", "__main__:brevity")
    assert run.config.algo.loss.id == "__main__:policy_gradient"
    (source,) = (run.path / "sources").glob("*.py")
    assert source.read_text().strip() == OBJECTS.strip()
    assert [row["step"] for row in run.rows_of("step")] == [0, 1, 2], "the resumed run took the step it was given"
    assert all("policy/advantage" in row for row in run.rows_of("step")), "the loss of the cell was the loss"
    spoken = run.trajectories(0)[0]
    assert HOSTILE in spoken.prompt[-1].content
    assert spoken.reward == pytest.approx(float(spoken.success) - 0.01 * len(spoken.turns[-1].reply_text))


def test_a_loss_of_a_cell_cannot_go_to_other_processes_and_the_cell_says_what_to_do(executed):
    path, outputs = executed
    assert "exists in this process only" in printed(outputs["refused"])
    assert "top level of a file" in printed(outputs["refused"])
    assert not (path / "ranks").exists()


def test_the_report_was_written(executed):
    path, outputs = executed
    assert printed(outputs["report"]).strip() == str(Path("run") / "report.html")
    page = (path / "run" / "report.html").read_text()
    assert re.search(r'<script type="application/json" id="keel-data">', page)
    assert "<script>alert" not in page


def test_the_export_generates_in_plain_transformers(executed):
    path, outputs = executed
    assert re.search(r"torch.Size\(\[1, \d+\]\)", printed(outputs["export"]))
    assert [item.name for item in (path / "run" / "export").iterdir()] == ["000002"]
