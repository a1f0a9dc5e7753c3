"""A server that dies at every moment of its life, the real one's place taken by one that starts in a second: nothing is
lost, nothing doubled, and every token is of the weights whose version it bears."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keel.config import EngineConfig, ModelConfig
from keel.config_vllm import VllmConfig
from keel.engines.base import EngineError, GenerateRequest, GenerateResult, WeightSource
from keel.engines.vllm.client import VllmClient
from keel.engines.vllm.engine import VllmEngine
from keel.models.tiny import build_tiny_model
from keel.sync.base import SyncError
from keel.types import SamplingSettings

PRETENDER = Path(__file__).with_name("pretender.py")
SHELL = '#!/bin/sh\ncase "$*" in *find_spec*) exit 0;; esac\nexec {python} {script} "$@"\n'
FIRST = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = tmp_path_factory.mktemp("model")
    build_tiny_model("qwen3", path, vocab_size=1000, num_hidden_layers=1)
    return ModelConfig(path=str(path))


@pytest.fixture
def make(tmp_path: Path, model: ModelConfig) -> Iterator[Callable[..., VllmEngine]]:
    made = []
    shell = tmp_path / "python"
    shell.write_text(SHELL.format(python=sys.executable, script=PRETENDER))
    shell.chmod(0o755)

    def start(**settings: Any) -> VllmEngine:
        vllm = VllmConfig(python=str(shell), **settings)
        engine = VllmEngine(
            model, EngineConfig(id="vllm", vllm=vllm), max_sequence_tokens=4096, log_path=tmp_path / "vllm.log"
        )
        made.append(engine)
        return engine

    yield start
    for engine in made:
        asyncio.run(engine.close())


def ask(number: int, length: int = 60, session: str = "") -> GenerateRequest:
    return GenerateRequest(f"r{number}", session, (2, 3), SamplingSettings(1.0), length, (), seed=number)


def weights(tmp_path: Path, value: int | str) -> WeightSource:
    place = tmp_path / f"weights-{value}"
    place.mkdir()
    (place / "weights.safetensors").write_text(json.dumps(value))
    return WeightSource("file", str(place))


def kill(engine: VllmEngine) -> None:
    server = engine.host.server
    assert server is not None
    os.kill(server.pid, signal.SIGKILL)


def kill_at(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch, method: str, moment: str, *, times: int = 1) -> None:
    """Kill the server when the next calls of the client's `method` are under way, or have been answered."""
    original = getattr(VllmClient, method)
    left = [times]

    async def call(client: VllmClient, *arguments: Any, **options: Any) -> Any:
        if not left[0]:
            return await original(client, *arguments, **options)
        left[0] -= 1
        task = asyncio.ensure_future(original(client, *arguments, **options))
        await (task if moment == "after" else asyncio.sleep(0.01))
        kill(engine)
        return await task

    monkeypatch.setattr(VllmClient, method, call)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  (the host rings no bell)
            await asyncio.sleep(0.001)


def is_true(result: GenerateResult) -> bool:
    """Whether every token is of the weights that its span's version names: version v draws the token v + 1."""
    return all(set(span.token_ids) == {span.policy_version + FIRST} for span in result.spans)


MOMENTS = [
    ("generate", "during"),
    ("pause", "during"),
    ("pause", "after"),
    ("collective_rpc", "during"),
    ("collective_rpc", "after"),
    ("reset_prefix_cache", "after"),
    ("set_weight_version", "during"),
    ("set_weight_version", "after"),
    ("resume", "during"),
    ("resume", "after"),
]


@pytest.mark.parametrize(("method", "moment"), MOMENTS)
def test_a_death_at_any_moment_of_an_update_loses_and_doubles_nothing(
    make: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, moment: str
) -> None:
    engine = make()

    async def main() -> None:
        await engine.load_weights(weights(tmp_path, 7 + FIRST), 7)
        under_way = [asyncio.create_task(engine.generate(ask(number))) for number in range(4)]
        await asyncio.sleep(0.05)
        kill_at(engine, monkeypatch, method, moment)
        if method == "generate":
            under_way.append(asyncio.create_task(engine.generate(ask(4))))
            await asyncio.sleep(0.1)
        await engine.load_weights(weights(tmp_path, 8 + FIRST), 8)
        results = await asyncio.gather(*under_way)
        after = await engine.generate(ask(9))
        assert [result.request_id for result in results] == [f"r{number}" for number in range(len(results))]
        assert {len(result.token_ids) for result in results} == {60}
        assert all(map(is_true, results))
        assert [span.policy_version for span in after.spans] == [8]
        assert is_true(after)

    asyncio.run(main())
    assert engine.host.restarts == 1
    assert engine.host.version == 8


def test_a_server_that_dies_while_it_is_started_again_is_started_once_more(
    make: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = make()

    async def main() -> GenerateResult:
        await engine.load_weights(weights(tmp_path, 7 + FIRST), 7)
        kill_at(engine, monkeypatch, "collective_rpc", "during", times=2)
        kill(engine)
        return await engine.generate(ask(0))

    result = asyncio.run(main())
    assert engine.host.restarts == 3
    assert is_true(result)
    assert [span.policy_version for span in result.spans] == [7]


def test_a_pause_holds_over_a_death(make: Callable[..., VllmEngine]) -> None:
    engine = make()

    async def main() -> None:
        await engine.pause()
        task = asyncio.create_task(engine.generate(ask(0)))
        await asyncio.sleep(0.05)
        kill(engine)
        await asyncio.wait({task}, timeout=5)  # it is asked again, and held again
        assert engine.host.restarts == 1
        assert not task.done()
        await engine.resume()
        assert len((await task).token_ids) == 60

    asyncio.run(main())


def test_whoever_is_cancelled_leaves_the_restart_to_the_others(make: Callable[..., VllmEngine]) -> None:
    engine = make()

    async def main() -> None:
        kill(engine)
        tasks = [asyncio.create_task(engine.generate(ask(number, 5))) for number in range(3)]
        await until(lambda: engine.host.restarts == 1)  # under way: the new server is not up yet
        tasks[0].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert all(isinstance(result, GenerateResult) and is_true(result) for result in results[1:])

    asyncio.run(main())
    assert engine.host.restarts == 1


def test_weights_that_do_not_fit_leave_the_old_ones_also_for_a_new_server(
    make: Callable[..., VllmEngine], tmp_path: Path
) -> None:
    engine = make()

    async def main() -> None:
        await engine.load_weights(weights(tmp_path, 7 + FIRST), 7)
        with pytest.raises(SyncError, match="a stranger among the tensors"):
            await engine.load_weights(weights(tmp_path, "misfit"), 8)
        for _ in range(2):
            result = await engine.generate(ask(0, 5))
            assert is_true(result)
            assert [span.policy_version for span in result.spans] == [7]
            kill(engine)

    asyncio.run(main())


def test_a_server_started_over_weights_that_do_not_fit_is_never_drawn_from(
    make: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It holds neither the old weights nor the new ones, but those of its checkpoint."""
    engine = make()

    async def main() -> None:
        await engine.load_weights(weights(tmp_path, 7 + FIRST), 7)
        kill_at(engine, monkeypatch, "collective_rpc", "during")
        with pytest.raises(SyncError, match="a stranger among the tensors"):
            await engine.load_weights(weights(tmp_path, "misfit"), 8)
        with pytest.raises(EngineError, match=r"the server is lost.*a stranger among the tensors"):
            await engine.generate(ask(0, 5))

    asyncio.run(main())
    assert engine.host.restarts == 1
    assert engine.host.server is not None
    assert not engine.host.server.alive()


def test_a_model_that_is_neither_old_nor_new_is_never_drawn_from(
    make: Callable[..., VllmEngine], tmp_path: Path
) -> None:
    engine = make()

    async def main() -> None:
        under_way = asyncio.create_task(engine.generate(ask(0, 200)))
        await asyncio.sleep(0.05)
        with pytest.raises(SyncError, match="in part"):
            await engine.load_weights(weights(tmp_path, "torn"), 8)
        for task in (under_way, asyncio.create_task(engine.generate(ask(1)))):
            with pytest.raises(EngineError, match="lost"):
                await task

    asyncio.run(main())
    assert engine.host.server is not None
    assert not engine.host.server.alive()


def test_weights_of_a_broadcast_cannot_be_given_again(
    make: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = make()
    source = WeightSource("gloo", weights(tmp_path, 7 + FIRST).location)  # the pretender reads any location

    async def main() -> None:
        await engine.load_weights(source, 7)
        kill(engine)
        with pytest.raises(EngineError, match=r"broadcast, which nobody repeats.*sync\.transport"):
            await engine.generate(ask(0))

    asyncio.run(main())


def test_too_many_deaths_are_an_engine_error(make: Callable[..., VllmEngine]) -> None:
    engine = make(max_restarts=1)

    async def main() -> None:
        kill(engine)
        assert is_true(await engine.generate(ask(0, 5)))
        kill(engine)
        with pytest.raises(EngineError, match=r"engine\.vllm\.max_restarts is 1"):
            await engine.generate(ask(1, 5))
        assert not (await engine.health()).ok

    asyncio.run(main())


def test_nothing_is_left_in_shared_memory(make: Callable[..., VllmEngine], tmp_path: Path) -> None:
    engine = make()
    for version in (7, 8):
        asyncio.run(engine.load_weights(weights(tmp_path, version + FIRST), version))
        assert len(list(tmp_path.glob("keel-vllm-weights-*"))) == 1
    asyncio.run(engine.close())
    assert not list(tmp_path.glob("keel-vllm-weights-*"))


def test_no_log_is_left_that_nobody_asked_for(
    make: Callable[..., VllmEngine], model: ModelConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make()  # and with it the interpreter
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    config = EngineConfig(id="vllm", vllm=VllmConfig(python=str(tmp_path / "python")))
    engine = VllmEngine(model, config, max_sequence_tokens=4096)
    assert list(place.glob("keel-vllm-log-*/vllm.log"))
    asyncio.run(engine.close())
    assert not list(place.glob("keel-vllm-log-*"))


def test_memory_that_was_given_back_is_taken_again_after_a_push(
    make: Callable[..., VllmEngine], tmp_path: Path
) -> None:
    engine = make(args=("--enable-sleep-mode",))

    async def main() -> None:
        await engine.generate(ask(0, 5))
        for version in (7, 8):  # as a run does: sample, make room, learn, push
            await engine.release_memory()
            await engine.load_weights(weights(tmp_path, version + FIRST), version)
            result = await engine.generate(ask(version, 5))
            assert is_true(result)
            assert [span.policy_version for span in result.spans] == [version]

    asyncio.run(main())
    assert engine.host.restarts == 0


def test_a_pause_holds_while_memory_is_taken_again(make: Callable[..., VllmEngine]) -> None:
    engine = make(args=("--enable-sleep-mode",))

    async def main() -> None:
        await engine.release_memory()
        await engine.pause()
        task = asyncio.create_task(engine.generate(ask(0, 5)))
        await asyncio.wait({task}, timeout=1)
        assert not task.done()
        await engine.resume()
        assert len((await task).token_ids) == 5

    asyncio.run(main())
