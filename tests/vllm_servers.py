"""What tests of a real vLLM share: small models that its CPU kernels take, one engine at a time, requests."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keel.config import EngineConfig, ModelConfig
from keel.config_vllm import VllmConfig
from keel.engines.base import GenerateRequest
from keel.engines.vllm.engine import VllmEngine
from keel.types import SamplingSettings

PYTHON = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
VOCAB_SIZE = 400
CAPACITY = 512
# vLLM's CPU kernels take experts in multiples of 32, and heads of 32, 64, ...; sizes differ pairwise all the same.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"intermediate_size": 160, "num_hidden_layers": 3},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"hidden_size": 96, "moe_intermediate_size": 64, "head_dim": 32},
}


class OneEngine:
    """The one engine that lives: asking for another, or for one that was spoilt, closes it first."""

    def __init__(self, python: str, model: Callable[..., str], logs: Path) -> None:
        self._python, self._model, self._logs = python, model, logs
        self._key = ""
        self._engine: VllmEngine | None = None
        self.num_started = 0

    def __call__(self, preset: str = "gpt_oss", dtype: str = "float32", **settings: Any) -> VllmEngine:
        key = f"{preset} {dtype} {sorted(settings.items())}"
        if self._engine is None or key != self._key or self._engine.host.closed:
            self.close()
            self.num_started += 1
            vllm = VllmConfig(
                python=self._python, kv_cache_gib=0.25, args=("--enable-server-load-tracking",), **settings
            )
            self._engine = VllmEngine(
                ModelConfig(path=self._model(preset), dtype=dtype),
                EngineConfig(id="vllm", vllm=vllm),
                max_sequence_tokens=CAPACITY,
                log_path=self._logs / f"{self.num_started}-{preset}-{dtype}.log",
            )
            self._key = key
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            asyncio.run(self._engine.close())
            self._engine = None


def ask(
    tokens: tuple[int, ...] = tuple(range(30, 50)),
    *,
    session: str = "",
    length: int = 8,
    seed: int = 3,
    sampling: SamplingSettings = SamplingSettings(0.9, 0.95, 20),  # noqa: B008 (a constant)
    **options: Any,
) -> GenerateRequest:
    return GenerateRequest("id", session, tokens, sampling, length, (), seed, **options)


async def requests_at(engine: VllmEngine) -> int:
    """How many requests the server itself has taken and not answered; its metrics stand still while it is paused."""
    answer = await engine.host.client.get("/load")
    return int(answer["server_load"])


async def tokens_drawn(engine: VllmEngine) -> int:
    """How many tokens the server has drawn since it was started, those of requests under way among them."""
    text = (await engine.host.client._send("GET", "/metrics")).text
    found = re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)$", text, re.MULTILINE)
    return round(sum(float(number) for number in found))


async def until_drawn(engine: VllmEngine, number: int) -> None:
    """Until the server has drawn `number` tokens since it was started; asking it is what gives it time."""
    drawn = await tokens_drawn(engine)
    while drawn < number:
        await asyncio.sleep(0)
        drawn = await tokens_drawn(engine)


async def until_at_server(engine: VllmEngine, wanted: Callable[[int], bool]) -> None:
    """Until the server's number of requests is as `wanted`; asking it is what gives it time."""
    number = await requests_at(engine)
    while not wanted(number):
        await asyncio.sleep(0)
        number = await requests_at(engine)
