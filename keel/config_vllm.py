"""`[engine.vllm]`: a vLLM server, started by the run or attached to."""

from __future__ import annotations

from pydantic import Field

from keel.config_base import Section


class VllmConfig(Section):
    url: str = Field(
        "", pattern=r"^(https?://\S+)?$", description="a running server to attach to; empty: start one for the run"
    )
    python: str = Field(
        "",
        description="interpreter of vLLM's environment; empty: .venv-vllm/bin/python in or above the working directory "
        "if there is one, else the interpreter that runs Keel",
    )
    args: tuple[str, ...] = Field((), description="further arguments of the server, as its command line takes them")
    environment: dict[str, str] = Field(default_factory=dict, description="further environment variables of the server")
    startup_timeout_s: float = Field(600.0, gt=0, description="seconds until the server must be healthy")
    request_timeout_s: float = Field(600.0, gt=0, description="seconds that the server may take for one request")
    max_restarts: int = Field(3, ge=0, description="times that a dead server is started again before the run fails")
    tensor_parallel: int = Field(1, ge=1, description="cards that share one copy of the model")
    max_concurrency: int = Field(64, ge=1, description="requests at once; more wait on Keel's side")
    max_logprobs: int = Field(
        64, ge=1, description="most likely tokens that the server returns per draw; top_k must be below it"
    )
    kv_cache_gib: float = Field(
        1.0, ge=0, description="GiB for keys and values; 0 leaves it to the server (on CUDA a share of the card)"
    )
    enforce_eager: bool = Field(True, description="no compilation: half the start-up time; turn off for speed on CUDA")
    allow_weight_push: bool = Field(
        False, description="whether weights may be pushed to a server that the run only attached to"
    )
