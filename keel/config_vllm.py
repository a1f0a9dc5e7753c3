"""`[engine.vllm]`: a vLLM server, started by the run or attached to."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field, field_validator

from keel.config_base import Section

if TYPE_CHECKING:
    from keel.config import TrainConfig

SET_BY_KEEL = (
    *("--model", "--served-model-name", "--host", "--port", "--uds", "--api-key", "--dtype", "--max-model-len"),
    *("--max-num-seqs", "--enable-chunked-prefill", "--logprobs-mode", "--max-logprobs", "--generation-config"),
    *("--tensor-parallel-size", "-tp", "--worker-extension-cls", "--hf-overrides", "--kv-cache-memory-bytes"),
    *("--enforce-eager", "--enable-scale-out", "--skip-tokenizer-init", "--enable-prompt-tokens-details"),
)
UNFIT = {
    "--config": "a file of arguments could set what Keel sets",
    "--data-parallel-size": "weights reach one copy of the model",
    "-dp": "weights reach one copy of the model",
    "--enable-lora": "an adapter of the server's would be over the weights that are pushed",
    "--logits-processors": "log-probs would be those of another distribution",
    "--speculative-config": "a draft model would not follow the weights that are pushed",
    "-sc": "a draft model would not follow the weights that are pushed",
    "--spec-method": "a draft model would not follow the weights that are pushed",
    "--spec-model": "a draft model would not follow the weights that are pushed",
}
"""Arguments that a server of Keel's cannot have, and why."""
LEAVE_OUT = "leave it out, or attach to a server by url"
VARIABLES_SET_BY_KEEL = ("PYTHONPATH", "VLLM_SERVER_DEV_MODE")
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 2.0
"""vLLM takes a temperature between 0 and the first for the first, and refuses what is above the second."""
SUPPORT_SLACK = 12
"""Tokens asked for beyond top-k: those that tie with the last one are drawn from too."""


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
        64, ge=16, description="most likely tokens that the server returns per draw; top_k must be 12 or more below it"
    )
    kv_cache_gib: float = Field(
        1.0, ge=0, description="GiB for keys and values; 0 leaves it to the server (on CUDA a share of the card)"
    )
    enforce_eager: bool = Field(True, description="no compilation: half the start-up time; turn off for speed on CUDA")
    allow_weight_push: bool = Field(
        False, description="whether weights may be pushed to a server that the run only attached to"
    )

    @field_validator("args")
    @classmethod
    def _leave_ours(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for argument in value:
            if ours := _meant(argument, SET_BY_KEEL):
                raise ValueError(f"{argument!r} is {ours} or short for it, and {ours} is set by Keel; {LEAVE_OUT}")
            if unfit := _meant(argument, tuple(UNFIT)):
                raise ValueError(f"{argument!r} is {unfit} or short for it: {UNFIT[unfit]}; {LEAVE_OUT}")
        return value

    @field_validator("environment")
    @classmethod
    def _leave_our_variables(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name in VARIABLES_SET_BY_KEEL:
                raise ValueError(f"{name} is set by Keel; {LEAVE_OUT}")
        return value


def _meant(argument: str, flags: tuple[str, ...]) -> str:
    """The one of `flags` that the server's command line may take `argument` for, "" if none.

    It takes a beginning for the whole, "_" for "-", "--no-" before a switch, and "." before a field of a value.
    """
    given = argument.partition("=")[0].partition(".")[0]
    if not given.startswith("-") or given == "-":
        return ""
    given = given.replace("_", "-")
    for flag in flags:
        spellings = (flag, flag.replace("--", "--no-", 1)) if flag.startswith("--") else (flag,)
        if any(spelling.startswith(given) for spelling in spellings):
            return flag
    return ""


def refuse_with_vllm(config: TrainConfig, refuse: Callable[[bool, tuple[str, ...], str, str], None]) -> None:
    """Tell `refuse` (wrong?, options, what, fix) what cannot be had with `engine.id = "vllm"`."""
    engine, rollout = config.engine, config.rollout
    if engine.id != "vllm":
        return
    training = config.steps > 0
    refuse(
        engine.process == "separate",
        ("engine.process",),
        "a vLLM server is a process of its own already",
        'set engine.process = "same"',
    )
    refuse(
        training and bool(engine.vllm.url) and not engine.vllm.allow_weight_push,
        ("engine.vllm.url", "engine.vllm.allow_weight_push"),
        "training gives the engine new weights after every step, and this server is only attached to",
        "set engine.vllm.allow_weight_push = true if the server may be changed, or leave url out to start one",
    )
    refuse(
        bool(engine.vllm.url) and bool(engine.vllm.args or engine.vllm.environment or engine.vllm.python),
        ("engine.vllm.url", "engine.vllm.args", "engine.vllm.environment", "engine.vllm.python"),
        "a server that is attached to was started by somebody else, with arguments of their own",
        "leave out either url or the others",
    )
    most = engine.vllm.max_logprobs - SUPPORT_SLACK
    refuse(
        training and (rollout.top_p < 1 or rollout.top_k > 0) and not 0 < rollout.top_k <= most,
        ("rollout.top_k", "rollout.top_p", "engine.vllm.max_logprobs"),
        "vLLM tells what top-p and top-k left to choose from by its most likely tokens: their number must be bounded",
        f"set rollout.top_k to 1 ... {most}, or raise engine.vllm.max_logprobs",
    )
    for option, value in (("rollout.temperature", rollout.temperature), ("eval.temperature", config.eval.temperature)):
        refuse(
            0 < value < LEAST_TEMPERATURE or value > MOST_TEMPERATURE,
            (option,),
            f"vLLM draws at temperature 0, or from {LEAST_TEMPERATURE} to {MOST_TEMPERATURE}",
            "set one of these",
        )
