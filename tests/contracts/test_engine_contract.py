"""The engine's protocol, asked of every engine: in this process and in another."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from keel.config import EngineConfig, ModelConfig
from keel.engines.base import Engine, EngineError, GenerateRequest, GenerateResult, WeightSource
from keel.engines.embedded import EmbeddedEngine
from keel.engines.process import EngineProcess
from keel.models.policy import PolicyModel
from keel.sync.base import SyncError
from keel.sync.publish import publish_async
from keel.sync.transports import write_weights
from keel.types import SamplingSettings

CAPACITY = 64
CONFIG = EngineConfig(slots=3, prefill_tile=32)
PROMPT = tuple(range(30, 50))


@pytest.fixture(scope="module")
def model_path(tiny_checkpoint: Callable[..., str]) -> str:
    return tiny_checkpoint("gpt_oss", num_hidden_layers=3)


@pytest.fixture(scope="module", params=["embedded", "own copy", "process"])
def engine(request: pytest.FixtureRequest, model_path: str) -> Iterator[Engine]:
    if request.param == "process":
        process = EngineProcess(
            ModelConfig(path=model_path),
            CONFIG,
            max_sequence_tokens=CAPACITY,
            num_threads=torch.get_num_threads(),
        )
        yield process
        process.stop()
        return
    policy = PolicyModel.load(model_path)
    yield EmbeddedEngine(policy, CONFIG, max_sequence_tokens=CAPACITY, shares_weights=request.param == "embedded")


def ask(tokens: tuple[int, ...] = PROMPT, *, session: str = "", length: int = 8, seed: int = 3) -> GenerateRequest:
    return GenerateRequest("id", session, tokens, SamplingSettings(0.9, 0.95), length, (), seed, return_routes=True)


async def until_known(engine: Engine, count: int) -> None:
    """Until the engine has taken `count` requests, running or waiting; asking it is what gives it time."""
    known = -1
    while known < count:
        health = await engine.health()
        known = health.running + health.waiting
        await asyncio.sleep(0)


class Learner:
    """Anything with weights."""

    def __init__(self, policy: PolicyModel) -> None:
        self.policy = policy

    def weights_to(self, source: WeightSource) -> None:
        write_weights(source.location, dict(self.policy.model.named_parameters()))


def test_answers_are_the_embedded_engines_to_the_bit(engine: Engine, model_path: str) -> None:
    reference = EmbeddedEngine(PolicyModel.load(model_path), CONFIG, max_sequence_tokens=CAPACITY)

    async def several(of: Engine) -> list[Any]:
        requests = [ask(PROMPT[: 5 + 3 * i], session=f"{i}", seed=i) for i in range(5)]

        async def one(request: GenerateRequest) -> GenerateResult:
            result = await of.generate(request)
            await of.end_session(request.session_id)
            return result

        return [*await asyncio.gather(*map(one, requests)), await of.score(PROMPT)]

    assert asyncio.run(several(engine)) == asyncio.run(several(reference))


def test_requests_and_results_are_plain(engine: Engine) -> None:
    request = ask()
    result = asyncio.run(engine.generate(request))
    for value in (request, result, asyncio.run(engine.score(PROMPT))):
        assert pickle.loads(pickle.dumps(value)) == value
    assert pickle.loads(pickle.dumps(engine.capabilities())) == engine.capabilities()


def test_the_prefix_of_a_session_is_kept(engine: Engine) -> None:
    async def main() -> GenerateResult:
        first = await engine.generate(ask(session="kept"))
        second = await engine.generate(ask((*PROMPT, *first.token_ids, 7), session="kept"))
        await engine.end_session("kept")
        return second

    result = asyncio.run(main())
    assert result.num_cached_tokens == result.routes_start == len(PROMPT) + 8 - 1
    assert result.routed_experts is not None
    assert result.routed_experts.num_tokens == 1 + 1 + 8 - 1


def test_what_is_drawn_has_its_log_prob_settings_and_version(engine: Engine) -> None:
    result = asyncio.run(engine.generate(ask()))
    version = asyncio.run(engine.health()).policy_version
    assert result.finish_reason == "length"
    assert result.sampling == SamplingSettings(0.9, 0.95)
    assert [span.policy_version for span in result.spans] == [version]
    assert len(result.spans[0].token_ids) == len(result.spans[0].logprobs) == 8
    assert all(logprob <= 0.0 for logprob in result.spans[0].logprobs)


def test_a_request_that_does_not_fit_is_answered_in_words(engine: Engine) -> None:
    result = asyncio.run(engine.generate(ask(length=CAPACITY)))
    assert result.finish_reason == "error"
    assert str(engine.capabilities().max_sequence_tokens) in str(result.error)


def test_cancelling_aborts_and_frees(engine: Engine) -> None:
    async def main() -> None:
        await engine.pause()
        tasks = [asyncio.create_task(engine.generate(ask(session=f"c{i}", length=40))) for i in range(6)]
        await until_known(engine, 6)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await engine.resume()
        health = await engine.health()
        assert (health.running, health.waiting) == (0, 0)
        results = await asyncio.gather(*(engine.generate(ask(seed=i)) for i in range(6)))
        assert {result.finish_reason for result in results} == {"length"}

    asyncio.run(main())


def test_pausing_holds_and_resuming_releases(engine: Engine) -> None:
    async def main() -> None:
        await engine.pause()
        task = asyncio.create_task(engine.generate(ask()))
        for _ in range(20):
            assert (await engine.health()).ok
        assert not task.done()
        await engine.resume()
        assert len((await task).token_ids) == 8

    asyncio.run(main())


def test_memory_is_given_back_while_idle_and_changes_no_answer(engine: Engine) -> None:
    async def main() -> tuple[GenerateResult, GenerateResult]:
        before = await engine.generate(ask(session="kept"))
        await engine.release_memory()
        after = await engine.generate(ask(session="other"))
        for session in ("kept", "other"):
            await engine.end_session(session)
        return before, after

    before, after = asyncio.run(main())
    assert before.spans == after.spans
    assert after.num_cached_tokens == 0
    assert engine.capabilities().cache_bytes > 0


def test_a_bad_score_request_is_an_error_and_no_more(engine: Engine) -> None:
    with pytest.raises(EngineError, match="score"):
        asyncio.run(engine.score(()))
    assert asyncio.run(engine.health()).ok


def test_published_weights_are_sampled_from(engine: Engine, model_path: str) -> None:
    """Also through the file transport: the same bits as an engine over the learner's own modules."""
    shared = engine.capabilities().shares_weights
    policy = engine.policy if shared and isinstance(engine, EmbeddedEngine) else PolicyModel.load(model_path)
    old = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.05)
    reference = EmbeddedEngine(policy, CONFIG, max_sequence_tokens=CAPACITY, version=8)

    async def main() -> None:
        before = await engine.generate(ask())
        await publish_async(Learner(policy), engine, 8)
        after = await engine.generate(ask())
        assert after == await reference.generate(ask())
        assert after.spans[0].policy_version == 8
        assert (await engine.health()).policy_version == 8
        assert before.spans[0].logprobs != after.spans[0].logprobs or shared
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                parameter.copy_(old[name])
        await publish_async(Learner(policy), engine, 0)

    asyncio.run(main())


def test_weights_that_do_not_fit_change_nothing(engine: Engine, tmp_path: Path) -> None:
    if engine.capabilities().shares_weights:
        pytest.skip("shared storage always fits")
    write_weights(tmp_path, {"model.embed_tokens.weight": torch.zeros(2, 2), "stranger": torch.zeros(1)})

    async def main() -> None:
        before = await engine.generate(ask())
        with pytest.raises(SyncError, match="unexpected: stranger"):
            await engine.load_weights(WeightSource("file", str(tmp_path)), 9)
        assert await engine.generate(ask()) == before

    asyncio.run(main())


def test_a_closed_engine_fails_what_runs_and_refuses_what_comes(engine: Engine) -> None:
    """Runs last on each engine: nothing works afterwards."""

    async def main() -> None:
        await engine.pause()
        waiting = asyncio.create_task(engine.generate(ask()))
        await until_known(engine, 1)
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await waiting
        with pytest.raises(EngineError, match="closed"):
            await engine.generate(ask())
        assert not (await engine.health()).ok
        await engine.close()

    asyncio.run(main())
    if isinstance(engine, EngineProcess):
        assert not psutil.pid_exists(engine.pid)


# ---- the process


def start(model_path: str) -> EngineProcess:
    return EngineProcess(ModelConfig(path=model_path), CONFIG, max_sequence_tokens=CAPACITY, num_threads=1)


def test_a_dead_process_fails_those_who_wait_and_those_who_come(model_path: str) -> None:
    engine = start(model_path)

    async def main() -> None:
        await engine.pause()
        waiting = asyncio.create_task(engine.generate(ask()))
        await until_known(engine, 1)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="ended with code -9"):
            await waiting
        with pytest.raises(EngineError, match="ended with code -9"):
            await engine.generate(ask())
        assert not (await engine.health()).ok
        await engine.close()

    asyncio.run(main())


def test_a_model_that_cannot_be_loaded_is_reported_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="could not start"):
        start(str(tmp_path))


ORPHAN = """
import os, sys
from keel.config import EngineConfig, ModelConfig
from keel.engines.process import EngineProcess
if __name__ == "__main__":
    model, config = ModelConfig(path=sys.argv[1]), EngineConfig(slots=1, prefill_tile=32)
    engine = EngineProcess(model, config, max_sequence_tokens=40)
    print(engine.pid, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_process_whose_parent_is_killed_ends_by_itself(model_path: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(ORPHAN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.run(
        [sys.executable, str(script), model_path], stdout=subprocess.PIPE, env=environment, check=False, timeout=120
    )
    assert parent.returncode == -signal.SIGKILL
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(parent.stdout)).wait(timeout=60)
