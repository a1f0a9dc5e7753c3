"""The public names, configs in every form, and objects in place of names."""

from __future__ import annotations

import ast
import asyncio
import functools
import importlib
import json
import linecache
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

import keel
from keel import given, plugins
from keel.config import AlgoConfig, Plugin, TrainConfig
from keel.config_problems import ConfigError
from keel.envs.arithmetic import CalculatorEnv
from keel.given import configured, given_again, read_config
from keel.plugins import PluginError
from keel.sources import save_sources, sources_of

ROOT = Path(keel.__file__).parents[1]


class Echo(keel.Env):
    """Says a word; wants to hear it."""

    def __init__(self, *, words: int = 6) -> None:
        self.words = words

    def tasks(self, split):
        first = 0 if split == "train" else 100
        return [keel.Task(f"w{n}", {"word": f"w{n}"}) for n in range(first, first + self.words)]

    def reset(self, task):
        self.word = task.data["word"]
        return [keel.Message("user", f"Say {self.word}.")]

    def step(self, reply):
        return keel.Step(done=True, reward=float(reply.final == self.word), success=reply.final == self.word)

    def demonstrations(self, count, *, seed, start):
        tasks = [self.tasks("train")[(seed + n) % self.words] for n in range(start, start + count)]
        replies = [((keel.Message("assistant", task.data["word"], channel="final"),),) for task in tasks]
        return [keel.Demonstration(task, reply) for task, reply in zip(tasks, replies, strict=True)]


def brevity(trajectory, task):
    return -0.01 * len(trajectory.turns[-1].reply_text)


def plain_loss(inputs, *, scale: float = 1.0):
    return -scale * inputs.required_advantages() * inputs.logprobs, {}


SMALL = {
    "steps": 1,
    "num_threads": 1,
    "log": {"live": "off"},
    "model": {"tiny": {"preset": "qwen3", "vocab_size": 320, "options": {"num_hidden_layers": 2, "hidden_size": 32}}},
    "rollout": {"groups_per_step": 1, "group_size": 2, "max_turns": 1, "max_new_tokens": 8, "max_sequence_tokens": 192},
    "engine": {"slots": 4},
    "checkpoint": {"every": 1},
}


# ---- names


def test_every_public_name_is_there_once_and_mypy_sees_the_same():
    imported = set()
    for node in ast.walk(ast.parse(Path(keel.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "keel":
            imported |= {alias.asname or alias.name for alias in node.names}
    assert imported | {"__version__"} == set(keel.__all__)
    assert len(keel.__all__) == len(set(keel.__all__))
    asked = "train evaluate rollout load_run load_record TrainConfig Env Step Message Task task_env tool resume"
    assert set(asked.split()) <= set(keel.__all__)
    for name in keel.__all__:
        assert getattr(keel, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = keel.trian


def test_no_module_hides_a_public_function():
    for name in set(keel.__all__) - {"attention", "report"}:
        for place in (ROOT / "keel" / name, ROOT / "keel" / f"{name}.py"):
            assert not place.exists(), place


def test_import_keel_imports_next_to_nothing():
    code = "import sys; before = set(sys.modules); import keel; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    others = {name.partition(".")[0] for name in done.stdout.split()} - sys.stdlib_module_names
    assert others == {"keel"}


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "keel" / "py.typed").read_text() == ""


# ---- a config in three forms

TOML = """steps = 3
env = { id = "CalculatorEnv" }
[model]
path = "somewhere"
[algo.loss]
id = "ppo_clip"
clip_high = 0.3
"""


def test_a_config_is_the_same_as_object_file_and_mapping(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    mapping = {
        "steps": 3,
        "env": {"id": "CalculatorEnv"},
        "model": {"path": Path("somewhere")},
        "algo": {"loss": Plugin(id="ppo_clip", clip_high=0.3)},
        "log": {"trackers": ()},
    }
    configs = [keel.load_config(path), path, str(path), mapping]
    read = [read_config(config)[0] for config in configs]
    assert all(config == read[0] for config in read)
    with configured(mapping) as config:
        assert config == read[0]
    assert read_config("quickstart")[0] == keel.load_config("quickstart")


@pytest.mark.parametrize(
    ("mapping", "found"),
    [
        ({"rollout": {"group_sice": 3}}, ["config, rollout.group_sice", "did you mean 'group_size'"]),
        ({"steps": "3"}, ["config, steps", "takes a whole number"]),
        ({"env": {"id": CalculatorEnv}}, ["config, env.id: is an object", "env=..."]),
        ({"algo": {"loss": {"id": plain_loss}}}, ["config, algo.loss.id: is an object", "loss=..."]),
        ({"model": {"tiny": {"options": {"width": object()}}}}, ["config, model.tiny.options.width"]),
        ({"steps": float("nan")}, ["config"]),
        (5, ["is no config", "TOML file"]),
        ("missing.toml", ["missing.toml: cannot be read"]),
        ({"env": {"id": "CalculatorEnv"}}, ["model.path or model.tiny.preset is needed"]),
        ({"model": {"path": "x"}}, ["env.id is needed"]),
        ({"model": {"path": "x"}, "env": {"id": "CalculatorEvn"}}, ["config, env.id", "did you mean 'CalculatorEnv'"]),
    ],
)
def test_a_wrong_config_is_told_with_its_place_and_the_fix(mapping, found):
    with pytest.raises(ConfigError) as caught, configured(mapping):
        pass
    for text in found:
        assert text in str(caught.value)


def test_a_wrong_plug_in_of_a_file_is_told_with_its_line(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TOML.replace("clip_high", "clip_hihg"))
    with pytest.raises(ConfigError, match=r"run\.toml:7: .*\n.*\n.*did you mean 'clip_high'"), configured(path):
        pass


# ---- objects


def local() -> object:
    return lambda trajectory, task: 0.0


class Judge:
    def score(self, trajectory, task):
        return 1.0

    def __call__(self, trajectory, task):
        return 2.0


@pytest.mark.parametrize(
    ("target", "name", "imported"),
    [
        (brevity, "brevity", True),
        (Judge.score, "Judge.score", True),
        (Echo, "Echo", True),
        (local(), "local.<locals>.<lambda>", False),
        (Judge(), "Judge.<object>", False),
        (Judge().score, "Judge.score.<object>", False),
        (functools.partial(brevity), "brevity.<partial>", False),
    ],
    ids=lambda value: None,
)
def test_an_object_is_named_so_that_the_name_leads_back_or_says_that_it_cannot(target, name, imported):
    found = plugins.name_of(target)
    assert found == f"{__name__}:{name}"
    assert plugins.can_be_imported_elsewhere(found) is imported
    if imported:
        assert plugins.resolve(found, "keel.rewards") is target
    else:
        with pytest.raises(PluginError, match=r"pass it again, as in keel.resume\(run, reward=\.\.\.\)"):
            plugins.resolve(found, "keel.rewards")
    with plugins.holding({("keel.rewards", found): target}):
        assert plugins.resolve(found, "keel.rewards") is target
        with pytest.raises(PluginError):
            plugins.resolve(f"{__name__}:nothing", "keel.rewards")


def test_a_name_that_leads_to_another_object_is_not_taken_for_one_that_leads_back(monkeypatch):
    before = brevity
    monkeypatch.setattr(sys.modules[__name__], "brevity", lambda trajectory, task: 5.0)
    assert plugins.name_of(before) == f"{__name__}:brevity.<object>"


def test_what_is_held_is_by_kind_and_ends_with_its_block():
    first, second = local(), local()
    name = plugins.name_of(first)
    with plugins.holding({("keel.rewards", name): first, ("keel.algo.losses", name): second}):
        assert plugins.resolve(name, "keel.rewards") is first
        assert plugins.resolve(name, "keel.algo.losses") is second
        another = plugins.holding({("keel.rewards", name): second})
        with pytest.raises(PluginError, match="another run of this process"), another:
            pass
        with plugins.holding({("keel.rewards", name): first}):
            pass
        assert plugins.resolve(name, "keel.rewards") is first
    with pytest.raises(PluginError):
        plugins.resolve(name, "keel.rewards")


def test_a_program_without_the_name_is_told_what_to_pass():
    with pytest.raises(PluginError, match=r"no 'gone' in this program.*keel.resume\(run, loss=\.\.\.\)"):
        plugins.resolve("__main__:gone", "keel.algo.losses")


RUNNABLE = {"model": {"path": "x"}}


@pytest.mark.parametrize(
    ("objects", "found"),
    [
        ({"env": Echo()}, "give the class, or a function without arguments"),
        ({"env": 5}, "env is a int"),
        ({"env": lambda needed: Echo()}, r"takes \(needed\); it must take no arguments"),
        ({"env": Echo, "reward": lambda prompts, completions, **columns: [0.0]}, r"TRL's form.*keel\.task_env"),
        ({"env": Echo, "reward": lambda trajectory: 0.0}, r"must take \(trajectory, task\) -> float"),
        ({"env": Echo, "reward": lambda trajectory, task, needed: 0.0}, "must take"),
        ({"env": Echo, "reward": lambda trajectory, task, *, needed: 0.0}, "needs the option 'needed'"),
        ({"env": Echo, "reward": 1.0}, "reward is a float"),
        ({"env": Echo, "loss": lambda: None}, r"must take \(LossInputs"),
        ({"env": Echo, "loss": "ppo_clipp"}, "did you mean 'ppo_clip'"),
        ({"env": "missing_module:Env"}, "cannot import 'missing_module'"),
    ],
)
def test_an_object_that_cannot_be_what_it_is_given_as_is_refused(objects, found):
    with pytest.raises((PluginError, ConfigError), match=found), configured(RUNNABLE, **objects):
        pass


def test_objects_stand_in_the_config_by_name_and_options_go_with_the_plug_in_they_are_of():
    base = {
        **RUNNABLE,
        "env": {
            "id": "CalculatorEnv",
            "options": {"max_terms": 2},
            "reward": {"id": "exact_match", "ignore_case": True},
        },
        "algo": {"loss": {"id": "ppo_clip", "clip_high": 0.3}},
    }
    with configured(base, env=Echo, reward=brevity, loss=plain_loss) as config:
        assert (config.env.id, config.env.options) == (f"{__name__}:Echo", {})
        assert config.env.reward == Plugin(id=f"{__name__}:brevity")
        assert config.algo.loss == Plugin(id=f"{__name__}:plain_loss")
        assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    with configured(base, env=CalculatorEnv, reward="exact_match", loss="ppo_clip") as config:
        assert config.env.options == {}, "another name is another plug-in"
        assert config.env.reward.options == {"ignore_case": True}
        assert config.algo.loss.options == {"clip_high": 0.3}
    with configured({**RUNNABLE, "env": {"options": {"words": 3}}}, env=Echo) as config:
        assert config.env.options == {"words": 3}
    misspelt = configured({**RUNNABLE, "env": {"options": {"wodrs": 3}}}, env=Echo)
    with pytest.raises(ConfigError, match="did you mean 'words'"), misspelt:
        pass


def test_an_evaluation_needs_no_loss():
    algo = {"loss": {"id": "gone_module:loss"}}
    with pytest.raises(ConfigError, match="gone_module"), configured({**RUNNABLE, "algo": algo}, env=Echo):
        pass
    with configured({**RUNNABLE, "algo": algo}, env=Echo, learns=False) as config:
        assert config.algo == AlgoConfig()


def test_several_ranks_take_a_loss_that_they_can_import_and_no_other():
    ranks = {**RUNNABLE, "learner": {"ranks": 2}}
    with configured(ranks, env=Echo, reward=local(), loss=plain_loss):
        pass
    wrapped = configured(ranks, env=Echo, loss=functools.partial(plain_loss))
    with pytest.raises(PluginError, match=r"learner\.ranks is 2.*top level of a file.*learner\.ranks = 1"), wrapped:
        pass


def test_given_again_holds_under_the_runs_names_and_refuses_another_plug_in():
    here = local()
    config = TrainConfig(env={"id": "__main__:Gone", "reward": f"{__name__}:local.<locals>.<lambda>"})
    with given_again(config, env=Echo, reward=here):
        assert plugins.resolve("__main__:Gone", "keel.envs") is Echo
        assert plugins.resolve(config.env.reward.id, "keel.rewards") is here
    with given_again(config, env=f"{__name__}:Echo"):
        assert plugins.resolve("__main__:Gone", "keel.envs") is Echo
    another = given_again(config, loss=plain_loss)
    with pytest.raises(PluginError, match=r"the run's loss is 'ppo_clip', got .*plain_loss.*config\.toml"), another:
        pass


# ---- sources


def module_at(path: Path, text: str, monkeypatch) -> ModuleType:
    path.write_text(text)
    monkeypatch.syspath_prepend(str(path.parent))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return importlib.import_module(path.stem)


def test_the_module_and_what_it_calls_of_the_users_is_kept_and_nothing_else(tmp_path, monkeypatch):
    module_at(tmp_path / "own_helper.py", "import json\ndef strip(text):\n    return json.dumps(text)\n", monkeypatch)
    module_at(tmp_path / "own_other.py", "def unused():\n    pass\n", monkeypatch)
    imports = "import numpy\nimport own_helper\nimport own_other\n"
    text = imports + "def score(trajectory, task):\n    return own_helper.strip('')\n"
    module = module_at(tmp_path / "own_rewards.py", text, monkeypatch)
    for target in (module.score, functools.partial(module.score), functools.lru_cache(module.score)):
        found = list(sources_of(target))
        assert [source.name for source in found] == ["own_rewards", "own_helper"]
        assert found[0].text == text
    assert list(sources_of(CalculatorEnv)) == list(sources_of(json.dumps)) == list(sources_of(len)) == []


def test_functions_inside_an_object_or_a_closure_are_found(tmp_path, monkeypatch):
    module = module_at(tmp_path / "own_closed.py", "def reward(trajectory, task):\n    return 0.0\n", monkeypatch)
    env = keel.task_env([{"question": str(n), "answer": "a"} for n in range(40)], reward=[(module.reward, 1.0)])
    assert [source.name for source in sources_of(env)] == ["own_closed"]

    def closed(trajectory, task):
        return module.reward(trajectory, task)

    assert "own_closed" in [source.name for source in sources_of(closed)]


def cell(text: str, name: str, number: int) -> object:
    """What a notebook makes of a cell: code of no file, whose lines `linecache` has, in `__main__`."""
    file = f"/tmp/ipykernel_1/{number}.py"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    space = {"__name__": "__main__", "keel": keel}
    exec(compile(text, file, "exec"), space)
    return space[name]


def test_of_a_notebook_the_cell_is_kept_and_without_a_source_that_is_said(tmp_path, monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    text = "class Env2(keel.Env):\n    def tasks(self, split):\n        return []\n"
    (found,) = sources_of(cell(text, "Env2", 7))
    assert (found.name, found.text) == ("Env2", text)
    space: dict = {"__name__": "__main__"}
    exec("def typed(trajectory, task):\n    return 0.0\n", space)
    with configured(RUNNABLE, env=cell(text, "Env2", 8), reward=space["typed"]) as config:
        save_sources(config, tmp_path / "sources")
    first, second = json.loads((tmp_path / "sources" / "sources.json").read_text())["sources"]
    assert first == {"option": "env.id", "name": config.env.id, "files": ["Env2.py"]}
    assert (second["option"], second["files"]) == ("env.reward", [])
    assert "no source is available" in second["note"]
    assert (tmp_path / "sources" / "Env2.py").read_text() == text


def test_a_source_that_changed_is_kept_beside_the_old_one(tmp_path, monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    directory = tmp_path / "sources"
    for number, gain in enumerate((1, 2, 1), start=20):
        text = f"def gain(trajectory, task):\n    return {gain}.0\n"
        with configured(RUNNABLE, env="CalculatorEnv", reward=cell(text, "gain", number)) as config:
            save_sources(config, directory)
    assert sorted(path.name for path in directory.iterdir()) == ["gain.2.py", "gain.py", "sources.json"]
    entries = json.loads((directory / "sources.json").read_text())["sources"]
    assert [entry["files"] for entry in entries] == [["gain.py"], ["gain.2.py"]]


def test_without_plug_ins_of_ones_own_there_are_no_sources(tmp_path):
    with configured(RUNNABLE, env="CalculatorEnv", reward="exact_match") as config:
        save_sources(config, tmp_path / "sources")
    assert not (tmp_path / "sources").exists()


def test_a_key_in_a_source_is_not_kept(tmp_path, monkeypatch):
    key = "sk-proj-" + "a1B2c3D4" * 6
    text = f"KEY = '{key}'\ndef judged(trajectory, task):\n    return float(bool(KEY))\n"
    module = module_at(tmp_path / "own_keyed.py", text, monkeypatch)
    (source,) = sources_of(module.judged)
    assert key not in source.text
    assert "def judged" in source.text


# ---- whole runs


def test_a_run_with_objects_in_a_running_event_loop_and_its_resumption(tmp_path):
    """Trained in a coroutine, as in a notebook's cell; resumed with the objects given again, and evaluated."""

    def shorter(trajectory, task):
        return brevity(trajectory, task)

    async def in_a_cell():
        return keel.train(
            {**SMALL, "run_dir": tmp_path / "run"}, env=lambda: Echo(words=3), reward=shorter, loss=plain_loss
        )

    summary = asyncio.run(in_a_cell())
    assert (summary.state, summary.steps) == ("completed", 1)
    run = keel.load_run(summary.run_dir)
    here = "test_a_run_with_objects_in_a_running_event_loop_and_its_resumption"
    assert run.config.env.id == f"{__name__}:{here}.<locals>.in_a_cell.<locals>.<lambda>"
    assert run.config.env.reward.id == f"{__name__}:{here}.<locals>.shorter"
    assert run.config.algo.loss.id == f"{__name__}:plain_loss"
    assert (run.path / "sources" / "test_api.py").read_text() == Path(__file__).read_text()
    assert all(t.reward == pytest.approx(brevity(t, t.task)) for t in run.trajectories(0) if not t.success)
    assert {t.task.id for t in run.trajectories(0)} <= {"w0", "w1", "w2"}

    assert keel.resume(run.path).reason == "it was complete before; nothing was done"
    config = run.path / "config.toml"
    config.write_text(run.config_text.replace("steps = 1 ", "steps = 2 ", 1))
    with pytest.raises(ConfigError) as caught:
        keel.resume(run.path)
    for keyword in ("env=", "reward="):
        assert f"keel.resume(run, {keyword}...)" in str(caught.value)
    assert keel.resume(run.path, env=lambda: Echo(words=3), reward=shorter).steps == 2
    assert [row["step"] for row in keel.load_run(run.path).rows_of("step")] == [0, 1]

    result = keel.evaluate(keel.load_run(run.path), env=Echo, reward=shorter, num_tasks=2)
    assert (result.num_tasks, [task.task_id for task in result.tasks]) == (2, ["w100", "w101"])


def test_a_run_may_be_trained_in_another_thread(tmp_path):
    found = []
    config = {**SMALL, "run_dir": tmp_path / "run"}
    thread = threading.Thread(target=lambda: found.append(keel.train(config, env=Echo)))
    thread.start()
    thread.join()
    assert [summary.state for summary in found] == ["completed"]


PROGRAM = """
import keel
CONFIG = {config}

def loss(inputs, *, scale: float = 2.0):
    return -scale * inputs.required_advantages() * inputs.logprobs, {{}}

class Hidden(keel.Env):
    def tasks(self, split):
        return [keel.Task(str(n)) for n in range(4)]

    def reset(self, task):
        return [keel.Message("user", "Say anything.")]

    def step(self, reply):
        return keel.Step(done=True, reward=float(len(reply.text) % 2))

if __name__ == "__main__":
    print(keel.train(CONFIG, env=Hidden, loss=loss).state)
"""


@pytest.mark.parametrize("from_file", [True, False], ids=["script", "standard input"])
def test_a_loss_of_the_program_itself_trains_on_two_ranks_if_they_can_import_it(tmp_path, from_file):
    """A script's can be imported by its child processes; what was typed into an interpreter cannot, and is refused."""
    config = {**SMALL, "run_dir": str(tmp_path / "run"), "learner": {"ranks": 2}}
    program = PROGRAM.format(config=config)
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, *(["program.py"] if from_file else ["-"])],
        input="" if from_file else program,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    if from_file:
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1] == "completed"
        assert keel.load_run(tmp_path / "run").config.algo.loss.id == "__main__:loss"
        assert [path.name for path in (tmp_path / "run" / "sources").glob("*.py")] == ["program.py"]
    else:
        assert "the loss '__main__:loss' exists in this process only" in done.stderr
        assert not (tmp_path / "run").exists()


UNGUARDED = """
import multiprocessing, sys
import keel

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=print)
    child.start()
    child.join()
    sys.exit(child.exitcode)
keel.train({config})
"""


def test_a_program_that_its_own_processes_would_run_again_is_told_to_guard_its_top_level(tmp_path):
    config = {**SMALL, "run_dir": str(tmp_path / "run")}
    (tmp_path / "program.py").write_text(UNGUARDED.format(config=config))
    done = subprocess.run(
        [sys.executable, "program.py"], capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 1
    assert 'put its top level under `if __name__ == "__main__":`' in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_wrong_object_leaves_no_run_directory(tmp_path):
    with pytest.raises(PluginError):
        keel.train({**SMALL, "run_dir": tmp_path / "run"}, env=Echo, reward=lambda trajectory: 0.0)
    assert not (tmp_path / "run").exists()
    assert set(given.ROOMS) == {"env", "reward", "loss"}
