"""vLLM behind the engine's protocol: what every engine owes, asked of a real server, and its log-probs against plain
transformers."""

from __future__ import annotations

import asyncio
import pickle
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.routing_replay import sample_groups
from keel.algo.advantage import group_mean
from keel.algo.apply import add_advantages
from keel.batch import pack
from keel.config import AlgoConfig, LearnerConfig, ModelConfig, OptimConfig, Stage
from keel.engines.base import EngineError, GenerateResult, WeightSource
from keel.engines.vllm.engine import VllmEngine
from keel.learner.learner import Learner
from keel.sync.base import SyncError
from keel.sync.publish import publish_async
from keel.sync.transports import write_weights
from keel.types import SamplingSettings
from tests.vllm_servers import CAPACITY, VOCAB_SIZE, OneEngine, ask, tokens_drawn, until_at_server, until_drawn

PROMPT = tuple(range(30, 50))


@pytest.fixture
def engine(one_engine: OneEngine) -> VllmEngine:
    return one_engine()


@pytest.fixture(scope="module")
def reference(vllm_model: Callable[..., str]) -> Any:
    """The model in plain transformers, dense attention."""
    return AutoModelForCausalLM.from_pretrained(vllm_model(), attn_implementation="eager", dtype=torch.float32).eval()


@torch.no_grad()
def rows(model: Any, tokens: tuple[int, ...], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs [n, V] of what follows each token."""
    return torch.log_softmax(model(torch.tensor([tokens])).logits[0].float() / temperature, -1)


def gap(result: GenerateResult, prompt: tuple[int, ...], model: Any, temperature: float = 1.0) -> torch.Tensor:
    """Absolute differences [n] of the drawn tokens' log-probs and the model's."""
    wanted = rows(model, (*prompt, *result.token_ids), temperature)[len(prompt) - 1 : -1]
    drawn = torch.tensor(result.token_ids)
    told = torch.tensor([logprob for span in result.spans for logprob in span.logprobs])
    return (wanted.gather(1, drawn[:, None])[:, 0] - told).abs()


class Sender:
    """Anything with weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def weights_to(self, source: WeightSource) -> None:
        write_weights(source.location, dict(self.model.named_parameters()))


def test_log_probs_are_those_of_plain_transformers(engine: VllmEngine, reference: Any) -> None:
    async def main() -> list[GenerateResult]:
        settings = SamplingSettings(0.7)
        prompts = [tuple(range(20 + i, 40 + 3 * i)) for i in range(8)]
        return await asyncio.gather(
            *(engine.generate(ask(prompt, length=120, seed=i, sampling=settings)) for i, prompt in enumerate(prompts))
        )

    results = asyncio.run(main())
    gaps = torch.cat([gap(r, tuple(range(20 + i, 40 + 3 * i)), reference, 0.7) for i, r in enumerate(results)])
    assert len(gaps) == 960
    assert gaps.mean() <= 5e-6
    assert gaps.max() <= 1e-4


def test_scores_are_those_of_plain_transformers(engine: VllmEngine, reference: Any) -> None:
    tokens = tuple((7 * i + 11) % VOCAB_SIZE for i in range(200))
    told = asyncio.run(engine.score(tokens))
    wanted = rows(reference, tokens)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert (wanted - torch.tensor(told.logprobs)).abs().mean() <= 5e-6
    assert len(told.logprobs) == 199


def test_what_top_k_and_top_p_leave_is_told_and_its_log_probs_are_the_models(
    engine: VllmEngine, reference: Any
) -> None:
    """Temperature 0.7, top-p 0.9, top-k 20: over what the server says was left, a learner gets the same, to 1e-6 in the
    mean. Of a single token more cannot be had: float32 has steps of 4.8e-7 at 4 to 8 nats, and both sides add up."""
    settings = SamplingSettings(0.7, 0.9, 20)
    result = asyncio.run(engine.generate(ask(length=200, sampling=settings, return_support=True)))
    (span,) = result.spans
    assert span.support is not None
    ids = array("I")
    ids.frombytes(span.support.ids)
    wanted = rows(reference, (*PROMPT, *span.token_ids), 0.7)[len(PROMPT) - 1 : -1]
    start, gaps = 0, []
    for count, token, told, row in zip(span.support.counts, span.token_ids, span.logprobs, wanted, strict=True):
        left = list(ids[start : start + count])
        start += count
        assert 1 <= count <= 20
        assert token in left
        # The dense model's own cut: its 20 best, of these the fewest with 0.9 of their probability.
        best = torch.softmax(row.topk(20).values, 0)
        assert abs(count - int((best.cumsum(0) < 0.9).sum()) - 1) <= 1
        gaps.append(abs(float(row[token] - torch.logsumexp(row[left], 0)) - told))
    assert sum(gaps) / len(gaps) <= 1e-6
    assert max(gaps) <= 1e-5
    assert result.sampling == settings


def test_the_learner_agrees_over_what_the_server_left(engine: VllmEngine, vllm_model: Callable[..., str]) -> None:
    """The same through the learner's own packing and head, routing and cut its own."""
    groups = sample_groups(engine, SamplingSettings(0.7, 0.9, 20), num_groups=3, num_new=32, return_support=True)
    learner = Learner(ModelConfig(path=vllm_model()), LearnerConfig())
    learner.enter(Stage("reinforcement", 0, 8, AlgoConfig(), OptimConfig()))
    batch = add_advantages(pack(groups, max_tokens=400, num_updates=1), group_mean, {})
    metrics = learner.backward(batch).metrics
    assert metrics["mismatch/abs_mean"] <= 1e-6
    assert metrics["mismatch/abs_max"] <= 1e-5
    assert 1.0 < metrics["support/mean_size"] <= 20.0
    assert metrics["support/missing_share"] == 0.0
    assert metrics["support/own_diff"] < 0.01


def test_greedy_draws_the_most_likely(engine: VllmEngine, reference: Any) -> None:
    result = asyncio.run(engine.generate(ask(length=30, sampling=SamplingSettings(0.0))))
    best = rows(reference, (*PROMPT, *result.token_ids))[len(PROMPT) - 1 : -1].argmax(-1)
    assert result.token_ids == tuple(best.tolist())
    assert result.spans[0].logprobs == (0.0,) * 30


def test_a_seed_decides_what_is_drawn(engine: VllmEngine) -> None:
    """A long prompt too: fed in pieces it would end vLLM's CPU build."""
    prompt = tuple(range(30, 330))

    async def main() -> list[GenerateResult]:
        return [await engine.generate(ask(prompt, length=20, seed=seed)) for seed in (5, 5, 6)]

    first, again, other = asyncio.run(main())
    assert first.token_ids == again.token_ids != other.token_ids


def test_generation_ends_after_a_stop_token_and_only_there(engine: VllmEngine) -> None:
    free = asyncio.run(engine.generate(ask(length=12)))
    stop = free.token_ids[5]
    request = ask(length=12)
    stopped = asyncio.run(engine.generate(type(request)(**{**_fields(request), "stop_token_ids": (stop,)})))
    assert free.finish_reason == "length"
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]


def _fields(request: Any) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__dataclass_fields__}


def test_requests_results_and_capabilities_are_plain(engine: VllmEngine) -> None:
    result = asyncio.run(engine.generate(ask(return_support=True)))
    for value in (result, asyncio.run(engine.score(PROMPT)), engine.capabilities()):
        assert pickle.loads(pickle.dumps(value)) == value
    assert [span.policy_version for span in result.spans] == [asyncio.run(engine.health()).policy_version]


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (ask(length=CAPACITY), str(CAPACITY)),
        (ask(()), "empty"),
        (ask((VOCAB_SIZE,)), "vocabulary"),
        (ask(sampling=SamplingSettings(0.001)), "0.01"),
        (ask(sampling=SamplingSettings(2.5)), "2.0"),
        (ask(return_routes=True), "routes"),
    ],
)
def test_an_impossible_request_is_answered_in_words(engine: VllmEngine, request_: Any, told: str) -> None:
    result = asyncio.run(engine.generate(request_))
    assert result.finish_reason == "error"
    assert told in str(result.error)


def test_a_bad_score_request_is_an_error_and_no_more(engine: VllmEngine) -> None:
    with pytest.raises(EngineError, match="score"):
        asyncio.run(engine.score(()))
    assert asyncio.run(engine.health()).ok


def test_more_than_the_server_takes_wait_here(engine: VllmEngine) -> None:
    async def main() -> tuple[int, list[GenerateResult]]:
        await engine.pause()
        tasks = [asyncio.create_task(engine.generate(ask(length=4, seed=i))) for i in range(80)]
        await until_at_server(engine, lambda number: number == 64)
        waiting = (await engine.health()).waiting
        await engine.resume()
        return waiting, await asyncio.gather(*tasks)

    waiting, results = asyncio.run(main())
    assert waiting == 16
    assert {len(result.token_ids) for result in results} == {4}


def test_cancelling_aborts_at_the_server(engine: VllmEngine) -> None:
    async def main() -> None:
        await engine.pause()
        tasks = [asyncio.create_task(engine.generate(ask(session=f"c{i}", length=400))) for i in range(6)]
        await until_at_server(engine, lambda number: number == 6)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        health = await engine.health()
        assert (health.running, health.waiting) == (0, 0)
        await engine.resume()
        await until_at_server(engine, lambda number: number == 0)
        assert all(task.cancelled() for task in tasks)

    asyncio.run(main())


def test_ending_a_session_aborts_its_request(engine: VllmEngine) -> None:
    async def main() -> GenerateResult:
        await engine.pause()
        task = asyncio.create_task(engine.generate(ask(session="s", length=400)))
        await until_at_server(engine, lambda number: number == 1)
        busy = await engine.generate(ask(session="s"))
        assert "busy" in str(busy.error)
        await engine.end_session("s")
        result = await task
        await engine.end_session("unknown")
        await engine.resume()
        await until_at_server(engine, lambda number: number == 0)
        return result

    assert asyncio.run(main()).finish_reason == "abort"


def test_pausing_holds_and_resuming_releases(engine: VllmEngine) -> None:
    async def main() -> GenerateResult:
        await engine.pause()
        task = asyncio.create_task(engine.generate(ask()))
        await until_at_server(engine, lambda number: number == 1)
        assert await engine.host.client.is_paused()
        assert (await engine.health()).ok
        assert not task.done()
        await engine.resume()
        return await task

    assert len(asyncio.run(main()).token_ids) == 8


def test_memory_is_given_back_while_idle_only(engine: VllmEngine) -> None:
    async def main() -> tuple[GenerateResult, GenerateResult]:
        prompt = tuple(range(30, 330))  # two whole blocks of keys and values, which the server keeps
        before = await engine.generate(ask(prompt))
        kept = await engine.generate(ask(prompt))
        assert kept.num_cached_tokens == 256
        await engine.pause()
        task = asyncio.create_task(engine.generate(ask()))
        await until_at_server(engine, lambda number: number == 1)
        with pytest.raises(EngineError, match="under way"):
            await engine.release_memory()
        await engine.resume()
        await task
        await engine.release_memory()
        return before, await engine.generate(ask(prompt))

    before, after = asyncio.run(main())
    assert before.token_ids == after.token_ids
    assert after.num_cached_tokens == 0
    assert engine.capabilities().cache_bytes == 2**28


def test_published_weights_are_sampled_from_also_in_mid_generation(
    engine: VllmEngine, vllm_model: Callable[..., str], reference: Any
) -> None:
    """What was drawn before the switch has the old weights' log-probs, what came after it the new ones', with nothing
    left of the keys and values made before."""
    changed = AutoModelForCausalLM.from_pretrained(vllm_model(), attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.05)

    async def main() -> GenerateResult:
        drawn = await tokens_drawn(engine)
        during = [asyncio.create_task(engine.generate(ask(length=480, seed=i))) for i in range(16)]
        await until_drawn(engine, drawn + 3 * len(during))
        await engine.pause()  # else a fast server finishes while this process writes
        await publish_async(Sender(changed), engine, 8)
        await engine.resume()
        results = [result for result in await asyncio.gather(*during) if len(result.spans) == 2]
        assert results, "no request was under way when the weights changed"
        assert (await engine.health()).policy_version == 8
        await publish_async(Sender(reference), engine, 0)
        return results[0]

    during = asyncio.run(main())
    assert [span.policy_version for span in during.spans] == [0, 8]
    old, new = during.spans
    for span, model, before in ((old, reference, PROMPT), (new, changed, (*PROMPT, *old.token_ids))):
        wanted = rows(model, (*before, *span.token_ids), 0.9)[len(before) - 1 : -1]
        # Top-k and top-p renormalize: a drawn token is never less likely than the model says.
        told, own = torch.tensor(span.logprobs), wanted.gather(1, torch.tensor(span.token_ids)[:, None])[:, 0]
        assert (told - own >= -1e-5).all()


def test_weights_that_do_not_fit_change_nothing(engine: VllmEngine, tmp_path: Path) -> None:
    write_weights(tmp_path, {"model.embed_tokens.weight": torch.zeros(2, 2), "stranger": torch.zeros(1)})

    async def main() -> None:
        before = await engine.generate(ask())
        with pytest.raises(SyncError, match="stranger"):
            await engine.load_weights(WeightSource("file", str(tmp_path)), 9)
        assert (await engine.generate(ask())).spans == before.spans

    asyncio.run(main())


def test_a_closed_engine_fails_what_runs_and_refuses_what_comes(one_engine: OneEngine) -> None:
    """Last: the server is gone afterwards, with every process that came of it."""
    engine = one_engine()
    server = engine.host.server
    assert server is not None

    async def main() -> None:
        await engine.pause()
        waiting = asyncio.create_task(engine.generate(ask()))
        await until_at_server(engine, lambda number: number == 1)
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await waiting
        with pytest.raises(EngineError, match="closed"):
            await engine.generate(ask())
        assert not (await engine.health()).ok
        await engine.close()

    asyncio.run(main())
    assert not server.alive()
