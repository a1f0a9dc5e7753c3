"""How a vLLM server is started: which interpreter, which arguments, which environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import keel
from keel.config_vllm import VllmConfig
from keel.engines.base import EngineError

MODULE = "vllm.entrypoints.openai.api_server"
WORKER_PACKAGE = "keel_vllm_worker"
WORKER_EXTENSION = f"{WORKER_PACKAGE}.extension.WorkerExtension"
LEAST_BATCHED_TOKENS = 2048


def find_python(config: VllmConfig) -> str:
    """The interpreter of vLLM's environment, looked up as `engine.vllm.python` says.

    Raises EngineError if it is not there or has no vLLM.
    """
    python = config.python or _nearby_python() or sys.executable
    if os.sep in python:  # else it is looked up on PATH
        python = str(Path(python).absolute())  # the server works elsewhere; links stay, they make the environment
    fix = (
        "make an environment for vLLM (`make vllm-cpu` in a clone of Keel, or install the extra keel-rl[vllm]) and set "
        "engine.vllm.python to its interpreter"
    )
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, timeout=60, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"vllm: engine.vllm.python = {python!r} does not run ({error}); {fix}") from error
    if done.returncode != 0:
        raise EngineError(f"vllm: the interpreter {python!r} has no package vllm; {fix}")
    return python


def is_cpu_build(python: str) -> bool:
    """Whether the vLLM of this interpreter was built for CPUs, by what its package says of itself."""
    code = (
        "import importlib.util, pathlib\n"
        "place = pathlib.Path(importlib.util.find_spec('vllm').origin).parents[1]\n"
        "print(*(each.name for each in place.glob('vllm*.dist-info')))"
    )
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, timeout=60, check=False)  # noqa: S603
    return b"cpu" in done.stdout


def _nearby_python() -> str:
    here = Path.cwd()
    for directory in (here, *here.parents, Path(keel.__file__).parents[1]):
        candidate = directory / ".venv-vllm" / "bin" / "python"
        if candidate.exists():
            return str(candidate)
    return ""


def server_arguments(
    config: VllmConfig,
    model_path: str,
    *,
    port: int,
    name: str,
    dtype: str,
    max_sequence_tokens: int,
    model_overrides: Mapping[str, object],
) -> list[str]:
    """The server's command line after the interpreter.

    Log-probs are those of the distribution really drawn from; a prompt is fed in one piece, because with pieces a
    seeded request ends vLLM's CPU build; no default of the model's generation config gets in unasked. A directory is
    named from the root, because the server works in another one than this process.
    """
    if Path(model_path).is_dir():
        model_path = str(Path(model_path).resolve())
    arguments = [
        *("-m", MODULE, "--model", model_path, "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", dtype, "--max-model-len", str(max_sequence_tokens)),
        *("--max-num-seqs", str(config.max_concurrency)),
        *("--max-num-batched-tokens", str(max(max_sequence_tokens, LEAST_BATCHED_TOKENS, config.max_concurrency))),
        "--no-enable-chunked-prefill",
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", str(config.max_logprobs)),
        *("--generation-config", "vllm", "--enable-scale-out", "--skip-tokenizer-init"),
        *("--tensor-parallel-size", str(config.tensor_parallel)),
        *("--worker-extension-cls", WORKER_EXTENSION),
        "--disable-uvicorn-access-log",
        "--enable-prompt-tokens-details",
    ]
    if config.enforce_eager:
        arguments.append("--enforce-eager")
    if config.kv_cache_gib > 0:
        arguments += ["--kv-cache-memory-bytes", str(int(config.kv_cache_gib * 2**30))]
    if model_overrides:
        arguments += ["--hf-overrides", json.dumps(dict(model_overrides))]
    return [*arguments, *config.args]


def server_environment(config: VllmConfig, model_path: str, worker_directory: Path) -> dict[str, str]:
    """This process's environment as the server gets it. `worker_directory` holds the worker-side package and nothing
    else, so that no module of this interpreter's gets into vLLM's."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONSTARTUP")}
    if Path(model_path).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    return {
        **environment,
        "VLLM_NO_USAGE_STATS": "1",
        **config.environment,
        "VLLM_SERVER_DEV_MODE": "1",  # the control endpoints; the server listens on the loopback interface alone
        "PYTHONPATH": str(worker_directory),
    }


def guarded(command: Sequence[str], *, grace_s: float) -> list[str]:
    """`command` under the guardian, which ends it when this process ends."""
    return [sys.executable, "-I", str(Path(__file__).with_name("guardian.py")), str(grace_s), *command]
