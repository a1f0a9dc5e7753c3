"""How long new weights take from learner to engine, by each route.

What is timed is a whole publish: from the call to the moment at which the engine samples from the new weights under
their number (for a server: paused, written, caches dropped, resumed). The model is dense, random and float32, made in a
temporary directory, of as many bytes as asked for. The first push of each route is not counted.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from keel.bench.measure import BenchError
from keel.config import EngineConfig, ModelConfig
from keel.config_vllm import VllmConfig
from keel.engines.base import Engine
from keel.engines.embedded.engine import EmbeddedEngine
from keel.engines.embedded.load import load_policy
from keel.engines.process import EngineProcess
from keel.engines.vllm.engine import VllmEngine
from keel.models.policy import PolicyModel
from keel.models.tiny import build_tiny_model
from keel.sync.base import WeightSource
from keel.sync.publish import publish_async
from keel.sync.transports import SHARED_MEMORY, TIMEOUT_S, send_weights, weights_directory, write_weights

MIB = 2**20
CAPACITY = 64
# hidden, intermediate, heads, layers and vocabulary of a dense model of about so many MiB in float32.
SHAPES: Mapping[int, tuple[int, int, int, int, int]] = {
    32: (256, 704, 8, 9, 4096),
    1024: (1024, 3072, 16, 19, 16384),
}
ROUTES = ("shared", "file", "gloo", "vllm file", "vllm gloo", "vllm native")
NATIVE = ("--weight-transfer-config", '{"backend": "keel"}')


@dataclass(frozen=True)
class RouteTime:
    """One route at one size: seconds of each counted push, their median, and the bytes per second of that."""

    route: str
    num_bytes: int
    seconds: tuple[float, ...]
    median_s: float
    mib_per_s: float | None  # nothing moves over "shared"

    @classmethod
    def of(cls, route: str, num_bytes: int, seconds: Sequence[float]) -> RouteTime:
        middle = statistics.median(seconds)
        return cls(route, num_bytes, tuple(seconds), middle, None if route == "shared" else num_bytes / MIB / middle)


class _Sender:
    """A learner, as far as publishing goes, without an optimizer's memory."""

    def __init__(self, policy: PolicyModel) -> None:
        self.policy = policy
        self.version = 0

    @property
    def num_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.policy.trained_parameters().values())

    def weights_to(self, source: WeightSource) -> None:
        weights = {name: parameter.detach() for name, parameter in self.policy.trained_parameters().items()}
        if source.kind == "file":
            write_weights(source.location, weights, version=self.version)
        elif source.kind != "shared":
            send_weights(source.location, weights, version=self.version, timeout_s=TIMEOUT_S)


def measure_sync(sizes_mib: Sequence[int], routes: Sequence[str], *, repeats: int) -> list[RouteTime]:
    """Each of `routes` at each of `sizes_mib`, `repeats` pushes after one that is not counted.

    Raises BenchError for a size or route there is none of.
    """
    if unknown := [size for size in sizes_mib if size not in SHAPES]:
        raise BenchError(f"bench sync: sizes are {', '.join(map(str, SHAPES))} MiB, got {unknown[0]}")
    if strange := [route for route in routes if route not in ROUTES]:
        raise BenchError(f"bench sync: routes are {', '.join(ROUTES)}; got {strange[0]!r}")
    results = []
    for size in sizes_mib:
        with tempfile.TemporaryDirectory(prefix="keel-bench-") as directory:
            path = Path(directory) / "model"
            _build(size, path)
            results += asyncio.run(_measured(path, routes, repeats))
    return results


def as_json(results: Sequence[RouteTime], facts: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The figures and what they were measured on."""
    return {"benchmark": "sync", "command": command, "machine": dict(facts), "routes": [asdict(r) for r in results]}


def _build(size_mib: int, path: Path) -> None:
    hidden, intermediate, heads, layers, vocab_size = SHAPES[size_mib]
    build_tiny_model(
        "qwen3",
        path,
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=64,
        num_hidden_layers=layers,
    )


async def _measured(path: Path, routes: Sequence[str], repeats: int) -> list[RouteTime]:
    model = ModelConfig(path=str(path))
    sender = _Sender(load_policy(model, "cpu"))
    results = []
    for kind in ("shared", "separate", "vllm"):
        wanted = [route for route in routes if _engine_of(route) == kind]
        if not wanted:
            continue
        async with _engine(kind, model, sender) as engine:
            for route in wanted:
                push = _push(route, engine, sender)
                seconds = [await _timed(push, sender) for _ in range(repeats + 1)]
                results.append(RouteTime.of(route, sender.num_bytes, seconds[1:]))
    return results


def _engine_of(route: str) -> str:
    if route.startswith("vllm"):
        return "vllm"
    return "shared" if route == "shared" else "separate"


@asynccontextmanager
async def _engine(kind: str, model: ModelConfig, sender: _Sender) -> AsyncIterator[Engine]:
    settings = EngineConfig(slots=2)
    engine: Engine
    if kind == "shared":
        engine = EmbeddedEngine(sender.policy, settings, max_sequence_tokens=CAPACITY)
    elif kind == "separate":
        engine = EngineProcess(model, settings, max_sequence_tokens=CAPACITY, num_threads=torch.get_num_threads())
    else:
        vllm = VllmConfig(kv_cache_gib=0.25, max_concurrency=2, args=NATIVE)
        engine = VllmEngine(model, settings.model_copy(update={"vllm": vllm}), max_sequence_tokens=CAPACITY)
    try:
        yield engine
    finally:
        await engine.close()


def _push(route: str, engine: Engine, sender: _Sender) -> Callable[[], Awaitable[None]]:
    if route == "vllm native":
        assert isinstance(engine, VllmEngine)
        return _native_push(engine, sender)
    transport = "auto" if route == "shared" else route.removeprefix("vllm ")

    async def push() -> None:
        await publish_async(sender, engine, sender.version, transport=transport)

    return push


def _native_push(engine: VllmEngine, sender: _Sender) -> Callable[[], Awaitable[None]]:
    """vLLM's own start / update / finish, with a file in shared memory, between a pause and going on."""
    client = engine.host.client

    async def push() -> None:
        with weights_directory(SHARED_MEMORY) as location:
            sender.weights_to(WeightSource("file", location))
            await client.pause("keep")
            await client.start_weight_update()
            await client.update_weights({"location": location})
            await client.reset_prefix_cache(running=True)
            await client.finish_weight_update(str(sender.version))
            await client.resume()

    return push


async def _timed(push: Callable[[], Awaitable[None]], sender: _Sender) -> float:
    sender.version += 1
    begun = time.perf_counter()
    await push()
    return time.perf_counter() - begun
