"""Who may enter whom: the house's plan, checked on the source, and what is imported, checked in a fresh process."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "keel"
STANDARD = set(sys.stdlib_module_names)
ANYWHERE = {"keel", "keel.types", "keel.config", "keel.plugins", "keel.secrecy", "keel.files", "keel.causes"}
ANYWHERE |= {"keel.distortion"}
"""Floor 0 of the plan (and the bare package, for its version)."""
CONFIG_FILES = {f"keel.{path.stem}" for path in ROOT.glob("config*.py")} | {"keel.types", "keel.plugins"}
FLOOR_FOUR = {"keel.loop", "keel.build", "keel.records", "keel.recipes", "keel.evaluation", "keel.quickstart"}
FLOOR_FOUR |= {
    "keel.tiny_start",
    "keel.plan",
    "keel.signal_check",
    "keel.signal_result",
    "keel.preflights",
    "keel.replay",
    "keel.bench",
}
FLOOR_FOUR |= {"keel.engine_checks", "keel.device", "keel.step_watch", "keel.plan_memory", "keel.evaluation_result"}
LIGHT = {"pydantic", "rich", "tomlkit", "psutil"}

# room -> (rooms of Keel it may enter, other packages it may import). A room may always enter itself and the standard
# library; a module's name stands for itself and all below it.
MAY_ENTER: dict[str, tuple[set[str], set[str]]] = {
    "keel": ({"*"}, set()),  # the public names, imported when first used
    "keel.types": (set(), set()),
    "keel.plugins": ({"keel.types"}, set()),
    "keel.secrecy": ({"keel.types"}, set()),
    "keel.files": (set(), set()),
    "keel.causes": (set(), set()),
    "keel.distortion": ({"keel.types", "keel.causes"}, set()),
    "keel.config": (CONFIG_FILES | {"keel.distortion"}, {"pydantic"}),
    "keel.ops": (set(), {"torch"}),
    "keel.chat": (ANYWHERE, {"tokenizers", "transformers", "jinja2"}),
    "keel.envs": (ANYWHERE | {"keel.chat.base", "keel.rewards"}, {"pydantic", "reasoning_gym", "pyarrow"}),
    "keel.rewards": (ANYWHERE | {"keel.chat.base"}, set()),
    "keel.sandbox": (ANYWHERE, {"psutil"}),
    "keel.monitor": (CONFIG_FILES | {"keel.secrecy", "keel.files"}, LIGHT),
    "keel.report": (ANYWHERE | {"keel.monitor", "keel.runs"}, {"numpy", "tokenizers", "plotly"}),
    "keel.batch": ({"keel.types", "keel.batch_support"}, {"torch", "numpy"}),
    "keel.prefixes": (set(), set()),
    "keel.batch_support": ({"keel.types"}, {"torch", "numpy"}),
    "keel.models": (
        {"keel.ops", "keel.batch", "keel.types", "keel.distortion", "keel.sync.groups", "keel.prefixes"},
        {"torch", "transformers", "tokenizers", "safetensors", "numpy", "peft"},
    ),
    "keel.attention": ({"keel.models", "keel.ops"}, {"torch", "transformers"}),
    "keel.dist": (ANYWHERE, {"torch"}),
    "keel.sync": ({"keel.types", "keel.engines.base"}, {"torch", "safetensors"}),
    # Runs inside vLLM, where Keel cannot be imported.
    "keel.sync.vllm_worker": (set(), {"torch", "vllm", "safetensors", "huggingface_hub"}),
    "keel.algo": ({"keel.types", "keel.batch"}, {"torch"}),
    "keel.engines": (
        ANYWHERE | {"keel.config_vllm", "keel.models", "keel.ops", "keel.dist", "keel.sync"},
        {"torch", "transformers", "tokenizers", "safetensors", "numpy", "httpx2"},
    ),
    "keel.rollouts": (
        ANYWHERE | {"keel.chat", "keel.envs", "keel.rewards", "keel.engines.base"},
        {"numpy", "safetensors"},
    ),
    # Reads what a run wrote, and nothing else: no plug-in, no torch.
    "keel.runs": (CONFIG_FILES | {"keel.monitor", "keel.rollouts.store", "keel.step_record"}, set()),
    "keel.step_record": (ANYWHERE | {"keel.monitor", "keel.rollouts.store"}, {"numpy"}),
    "keel.learner": (
        ANYWHERE | {"keel.batch", "keel.algo", "keel.models", "keel.ops", "keel.dist", "keel.sync"},
        {"torch", "safetensors", "numpy", "transformers"},
    ),
}
FLOOR_FOUR |= {"keel.given", "keel.sources", "keel.api"}
FLOOR_FOUR |= {"keel.export", "keel.export_card", "keel.export_push"}
FLOOR_FOUR |= {"keel.gap", "keel.performance"}
for _name in CONFIG_FILES - {"keel.config", "keel.types", "keel.plugins"}:
    MAY_ENTER[_name] = (CONFIG_FILES | {"keel.distortion"}, {"pydantic", "tomlkit"})
for _name in FLOOR_FOUR:
    MAY_ENTER[_name] = (set(MAY_ENTER) - {"keel"} | FLOOR_FOUR, {"torch", "transformers", "numpy"})
COMMANDS = {"keel.cli"}
for _name in COMMANDS | {"keel.__main__"}:
    MAY_ENTER[_name] = ({"*"}, {"typer", "rich"})
MAY_ENTER["keel.export"][1].add("safetensors")
MAY_ENTER["keel.bench.vllm_program"] = (set(), {"vllm"})  # runs where Keel cannot be imported
MAY_ENTER["keel.bench"][1].update({"trl", "datasets", "liger_kernel"})  # what it compares with
MAY_ENTER["keel.gap"][1].update({"safetensors", "tokenizers"})
MAY_ENTER["keel.export_card"][1].add("huggingface_hub")
MAY_ENTER["keel.export_push"][1].add("huggingface_hub")
TAKE_STEPS = {"keel.quickstart", "keel.loop", "keel.api", "keel.signal_check", "keel.bench.step"}
DEEPEST = ("keel.cli", "keel.loop")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_within(module: str, rooms: set[str]) -> bool:
    return any(module == room or (room != "keel" and module.startswith(f"{room}.")) for room in rooms)


def room_of(module: str) -> str:
    fitting = [room for room in MAY_ENTER if is_within(module, {room})]
    assert fitting, f"{module} is in no room of the plan; give it one in tests/unit/test_imports.py, and say why"
    return max(fitting, key=len)


def imports_of(path: Path, *, at_run_time_only: bool = False) -> set[str]:
    """Modules imported anywhere in a file; those for type checkers alone are left out if so asked."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and at_run_time_only:
            skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level and "vllm_worker" in path.parts:
                continue  # goes by another name in vLLM's environment, so its modules find each other relatively
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            base = node.module or ""
            for alias in node.names:
                below = ROOT.parent.joinpath(*base.split("."), alias.name)
                is_module = base.split(".")[0] == "keel" and (below.is_dir() or below.with_suffix(".py").exists())
                found.add(f"{base}.{alias.name}" if is_module else base)
    return found


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[module_name(path) for path in FILES])
def test_a_module_enters_only_the_rooms_it_may(path):
    module = module_name(path)
    room = room_of(module)
    rooms, packages = MAY_ENTER[room]
    for imported in sorted(imports_of(path)):
        top = imported.split(".")[0]
        if top == "keel":
            assert rooms == {"*"} or is_within(imported, rooms | {room}) or imported == "keel", (
                f"{module} (room {room}) imports {imported}; it may enter: {sorted(rooms)}"
            )
        else:
            assert top in STANDARD | packages, f"{module} (room {room}) imports {imported}; it may: {sorted(packages)}"


def test_nothing_below_the_command_line_enters_the_loop():
    for path in FILES:
        module = module_name(path)
        if is_within(module, COMMANDS | TAKE_STEPS):
            continue
        assert not {name for name in imports_of(path) if is_within(name, {"keel.loop", "keel.cli"})} or (
            module == "keel.__main__"
        ), module


def test_there_are_no_cycles():
    graph: dict[str, set[str]] = defaultdict(set)
    modules = {module_name(path) for path in FILES}
    for path in FILES:
        module = module_name(path)
        if module == "keel":
            continue  # imports its public names when first used
        graph[module] = (imports_of(path, at_run_time_only=True) & modules) - {module, "keel"}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module in done:
            return
        for imported in sorted(graph[module]):
            # A package that gathers its modules' names is entered by those who use it, not by its own modules.
            if not module.startswith(f"{imported}."):
                visit(imported, (*trail, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


LIGHT_ROOMS = [
    "keel",
    "keel.types",
    "keel.config_load",
    "keel.cli",
    "keel.monitor",
    "keel.runs",
    "keel.chat",
    "keel.envs",
    "keel.rewards",
    "keel.engines.base",
    "keel.report.serve",
]


@pytest.mark.parametrize("room", LIGHT_ROOMS)
def test_importing_it_needs_no_torch(room):
    code = (
        "import importlib, sys; importlib.import_module(sys.argv[1]); "
        "sys.exit(', '.join(sorted({'torch', 'transformers'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, room], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_there_and_come_when_asked_for():
    code = (
        "import sys, keel; assert 'pydantic' not in sys.modules; "
        "[getattr(keel, name) for name in keel.__all__]; assert 'torch' not in sys.modules; "
        "assert set(keel.__all__) <= set(dir(keel))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
