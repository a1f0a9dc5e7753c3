"""Sessions, limits, aborts, new weights, failures: what the engine does around its passes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from keel.engines.base import EngineError, GenerateRequest, GenerateResult, WeightSource
from keel.engines.embedded import EmbeddedEngine
from keel.types import SamplingSettings

Make = Callable[..., EmbeddedEngine]
PROMPT = tuple(range(20, 41))


def ask(
    tokens: tuple[int, ...] = PROMPT,
    *,
    session: str = "s",
    length: int = 6,
    stops: tuple[int, ...] = (),
    seed: int = 0,
    routes: bool = True,
    sampling: SamplingSettings | None = None,
) -> GenerateRequest:
    return GenerateRequest("r", session, tokens, sampling or SamplingSettings(), length, stops, seed, routes)


async def turns_of_the_loop(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def finished(task: asyncio.Task[GenerateResult]) -> GenerateResult:
    """The task's result, or a failed test if it hangs: each turn of the loop is a pass of the engine."""
    for _ in range(500):
        if task.done():
            break
        await asyncio.sleep(0)
    assert task.done()
    return task.result()


# ---- sessions


def test_a_second_turn_feeds_only_what_is_new(make_engine: Make) -> None:
    engine = make_engine()

    async def main() -> tuple[GenerateResult, GenerateResult, int]:
        first = await engine.generate(ask())
        passes = engine.statistics()["prefill_passes"]
        longer = (*PROMPT, *first.token_ids, 3, 4, 5)
        second = await engine.generate(ask(longer))
        return first, second, engine.statistics()["prefill_passes"] - passes

    first, second, prefill_passes = asyncio.run(main())
    fed = len(PROMPT) + 6 - 1  # the last drawn token was not fed in the first turn
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == second.routes_start == fed
    assert second.routed_experts is not None
    assert second.routed_experts.num_tokens == len(PROMPT) + 6 + 3 + 6 - 1 - fed
    assert prefill_passes == 1


def test_a_prompt_that_does_not_extend_the_session_starts_again_in_its_slot(make_engine: Make) -> None:
    engine = make_engine(slots=1)

    async def main() -> list[GenerateResult]:
        await engine.generate(ask())
        changed = (*PROMPT[:19], 7, 8, 9)
        again = await engine.generate(ask(changed))
        await engine.end_session("s")
        return [again, await engine.generate(ask(changed, session="other"))]

    again, fresh = asyncio.run(main())
    assert again.num_cached_tokens == 0
    assert again.spans == fresh.spans
    assert again.routed_experts == fresh.routed_experts


def test_a_prompt_equal_to_what_is_cached_starts_again(make_engine: Make) -> None:
    engine = make_engine(slots=1)

    async def main() -> list[GenerateResult]:
        first = await engine.generate(ask(length=4))
        return [first, await engine.generate(ask((*PROMPT, *first.token_ids[:3]), length=1))]

    first, second = asyncio.run(main())
    assert second.num_cached_tokens == 0
    assert second.token_ids == first.token_ids[3:]


def test_sessions_without_a_slot_wait_in_the_order_they_came(make_engine: Make) -> None:
    engine = make_engine(slots=1)
    finished: list[str] = []

    async def one(name: str, length: int) -> None:
        await engine.generate(ask(session=name, length=length))
        finished.append(name)
        await engine.end_session(name)

    async def main() -> tuple[int, int]:
        tasks = [asyncio.create_task(one(name, 5)) for name in "abcdef"]
        await turns_of_the_loop(2)
        health = await engine.health()
        await asyncio.gather(*tasks)
        return health.running, health.waiting

    assert asyncio.run(main()) == (1, 5)
    assert finished == list("abcdef")


def test_a_session_at_rest_keeps_its_slot_as_long_as_nobody_needs_it(make_engine: Make) -> None:
    engine = make_engine(slots=2)

    async def main() -> None:
        await engine.generate(ask(session="first"))
        second = await engine.generate(ask(session="second"))
        # The third takes the slot of the one that has been at rest longest; nobody waits for ever.
        await finished(asyncio.create_task(engine.generate(ask(session="third"))))
        again = await finished(
            asyncio.create_task(engine.generate(ask((*PROMPT, *second.token_ids, 5), session="second")))
        )
        assert again.num_cached_tokens == len(PROMPT) + 6 - 1
        assert engine.statistics()["remade_tokens"] == 0
        assert sorted(engine._scheduler.slot_of) == ["second", "third"]

    asyncio.run(main())


def test_a_session_that_runs_gives_nothing_up(make_engine: Make) -> None:
    engine = make_engine(slots=1)

    async def main() -> None:
        running = asyncio.create_task(engine.generate(ask(session="holder", length=40)))
        waiting = asyncio.create_task(engine.generate(ask(session="next")))
        await turns_of_the_loop(20)
        assert not waiting.done()
        assert (await engine.health()).waiting == 1
        assert (await finished(running)).finish_reason == "length"
        assert (await finished(waiting)).finish_reason == "length"

    asyncio.run(main())


@pytest.mark.parametrize("between", [False, True])
def test_what_a_session_gave_up_is_made_anew_to_the_bit(make_engine: Make, between: bool) -> None:
    """Three turns, one of them of a single token, in a slot of its own and in one that others take every time."""

    async def main(engine: EmbeddedEngine) -> list[GenerateResult]:
        tokens: tuple[int, ...] = ()
        results = []
        for number, length in enumerate((9, 1, 14, 5)):
            tokens += tuple(range(100 + 20 * number, 111 + 20 * number))
            results.append(await finished(asyncio.create_task(engine.generate(ask(tokens, length=length)))))
            tokens += results[-1].token_ids
            if between:
                await finished(asyncio.create_task(engine.generate(ask((7, number), session=f"other {number}"))))
        return results

    engine = make_engine(slots=1)
    results = asyncio.run(main(engine))
    fed = [0, 19, 31, 56]  # a turn's last token is fed in the next
    assert [result.num_cached_tokens for result in results] == fed
    assert engine.statistics()["remade_tokens"] == (sum(fed) if between else 0)
    undisturbed = make_engine(slots=5)
    assert asyncio.run(main(undisturbed)) == results
    assert undisturbed.statistics()["remade_tokens"] == 0


def test_a_given_up_session_whose_weights_are_gone_feeds_everything_again(make_engine: Make) -> None:
    engine = make_engine(fresh=True, slots=1)

    async def main() -> list[GenerateResult]:
        first = await engine.generate(ask())
        await engine.generate(ask(session="other"))
        shift(engine, 1.01)
        await engine.load_weights(WeightSource("shared"), 4)
        longer = (*PROMPT, *first.token_ids, 9)
        second = await engine.generate(ask(longer))
        await engine.end_session("s")
        return [second, await engine.generate(ask(longer, session="fresh"))]

    second, fresh = asyncio.run(main())
    assert second.num_cached_tokens == 0
    assert second == fresh


def test_a_request_without_a_session_keeps_nothing(make_engine: Make) -> None:
    engine = make_engine(slots=1)

    async def main() -> None:
        for _ in range(3):
            result = await engine.generate(ask(session=""))
            assert result.num_cached_tokens == 0

    asyncio.run(main())


def test_a_session_runs_one_request_at_a_time(make_engine: Make) -> None:
    engine = make_engine()

    async def main() -> tuple[GenerateResult, ...]:
        return tuple(await asyncio.gather(engine.generate(ask()), engine.generate(ask())))

    first, second = asyncio.run(main())
    assert first.finish_reason == "length"
    assert second.finish_reason == "error"
    assert "busy" in str(second.error)


# ---- limits


def test_a_stop_token_ends_the_reply_and_belongs_to_it(make_engine: Make) -> None:
    engine = make_engine()
    whole = asyncio.run(engine.generate(ask(session="", length=20)))
    stop = whole.token_ids[9]
    first = whole.token_ids.index(stop)
    cut = asyncio.run(engine.generate(ask(session="", length=20, stops=(stop, 1))))
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: first + 1]
    assert cut.spans[0].logprobs == whole.spans[0].logprobs[: first + 1]
    assert whole.finish_reason == "length"


def test_a_stop_token_of_one_request_is_none_of_another_in_the_same_slot(make_engine: Make) -> None:
    engine = make_engine(slots=1)
    whole = asyncio.run(engine.generate(ask(session="", length=20)))
    asyncio.run(engine.generate(ask(session="", length=20, stops=whole.token_ids[:4])))
    assert asyncio.run(engine.generate(ask(session="", length=20))).spans == whole.spans


def test_a_slot_can_be_filled_to_the_last_token(make_engine: Make) -> None:
    engine = make_engine(capacity=30)
    result = asyncio.run(engine.generate(ask(session="", length=9)))
    assert len(result.token_ids) == 9


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (ask(length=70), "88 tokens per sequence"),
        (ask(()), "empty"),
        (ask(length=0), "max_new_tokens is 0"),
        (ask((1, 2, 10_000)), "token 10000"),
        (ask((1, -1)), "token -1"),
        (ask(sampling=SamplingSettings(temperature=float("nan"))), "temperature"),
        (ask(sampling=SamplingSettings(temperature=-1.0)), "temperature"),
        (ask(sampling=SamplingSettings(top_p=0.0)), "top_p"),
        (ask(sampling=SamplingSettings(top_k=-1)), "top_k"),
    ],
)
def test_an_impossible_request_is_refused_in_words_and_others_go_on(
    make_engine: Make, request_: GenerateRequest, word: str
) -> None:
    engine = make_engine()

    async def main() -> tuple[GenerateResult, ...]:
        refused = engine.generate(replace(request_, session_id="bad"))
        return tuple(await asyncio.gather(refused, engine.generate(ask(session="good"))))

    bad, good = asyncio.run(main())
    assert bad.finish_reason == "error"
    assert word in str(bad.error)
    assert bad.spans == ()
    assert good.finish_reason == "length"


def test_routes_that_are_not_kept_are_refused_and_not_invented(make_engine: Make) -> None:
    engine = make_engine(return_routes=False)
    assert not engine.capabilities().returns_routes
    assert "return_routes" in str(asyncio.run(engine.generate(ask())).error)
    assert asyncio.run(engine.generate(ask(routes=False))).routed_experts is None


def test_more_tokens_than_the_model_has_positions_are_refused(make_engine: Make) -> None:
    with pytest.raises(EngineError, match="positions"):
        make_engine(capacity=1_000_000)


# ---- aborting


def test_cancelling_frees_the_slot_and_the_session(make_engine: Make) -> None:
    engine = make_engine(slots=1)
    undisturbed = asyncio.run(engine.generate(ask(session="")))

    async def main() -> GenerateResult:
        running = asyncio.create_task(engine.generate(ask(session="gone", length=60, seed=5)))
        waiting = asyncio.create_task(engine.generate(ask(session="never", seed=6)))
        after = asyncio.create_task(engine.generate(ask(session="after")))
        await turns_of_the_loop(9)
        waiting.cancel()
        running.cancel()
        result = await finished(after)
        assert running.cancelled()
        assert waiting.cancelled()
        assert (await engine.health()).running == 0
        return result

    assert asyncio.run(main()).spans == undisturbed.spans


def test_those_who_wait_for_a_copy_of_a_cancelled_prompt_compute_it_themselves(make_engine: Make) -> None:
    long = tuple(i % 300 for i in range(70))
    undisturbed = asyncio.run(make_engine(slots=4).generate(ask(long, session="")))
    engine = make_engine(slots=4)

    async def main() -> list[GenerateResult]:
        tasks = [asyncio.create_task(engine.generate(ask(long, session=name))) for name in "abcd"]
        await engine.pause()
        await turns_of_the_loop(1)
        engine._scheduler.admit()
        tasks[0].cancel()
        await turns_of_the_loop(2)
        await engine.resume()
        return [await finished(task) for task in tasks[1:]]

    assert [result.spans for result in asyncio.run(main())] == [undisturbed.spans] * 3


def test_ending_a_session_that_generates_aborts_it(make_engine: Make) -> None:
    engine = make_engine()

    async def main() -> GenerateResult:
        running = asyncio.create_task(engine.generate(ask(length=60)))
        await turns_of_the_loop(8)
        await engine.end_session("s")
        await engine.end_session("nobody's")
        return await running

    result = asyncio.run(main())
    assert result.finish_reason == "abort"
    assert 0 < len(result.token_ids) < 60
    assert result.routed_experts is not None
    assert result.routed_experts.num_tokens == len(PROMPT) + len(result.token_ids) - 1


def test_nothing_runs_while_paused(make_engine: Make) -> None:
    engine = make_engine()

    async def main() -> None:
        await engine.pause()
        task = asyncio.create_task(engine.generate(ask()))
        await turns_of_the_loop(10)
        assert engine.statistics()["drawn_tokens"] == 0
        assert (await engine.health()).detail == "paused"
        await engine.resume()
        assert (await task).finish_reason == "length"

    asyncio.run(main())


def test_a_closed_engine_fails_what_runs_and_refuses_what_comes(make_engine: Make) -> None:
    engine = make_engine()

    async def main() -> None:
        running = asyncio.create_task(engine.generate(ask(length=60)))
        await turns_of_the_loop(5)
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await running
        with pytest.raises(EngineError, match="closed"):
            await engine.generate(ask())
        assert not (await engine.health()).ok

    asyncio.run(main())


# ---- new weights


def shift(engine: EmbeddedEngine, factor: float) -> None:
    with torch.no_grad():
        for parameter in engine.policy.parameters():
            parameter.mul_(factor)


def test_new_weights_between_turns_make_the_session_feed_everything_again(make_engine: Make) -> None:
    engine = make_engine(fresh=True)

    async def main() -> list[GenerateResult]:
        first = await engine.generate(ask())
        shift(engine, 1.01)
        await engine.load_weights(WeightSource("shared"), 4)
        longer = (*PROMPT, *first.token_ids, 9)
        second = await engine.generate(ask(longer))
        return [second, await engine.generate(ask(longer, session="fresh"))]

    second, fresh = asyncio.run(main())
    assert second.num_cached_tokens == second.routes_start == 0
    assert second == fresh
    assert [span.policy_version for span in second.spans] == [4]


def test_new_weights_in_the_middle_of_a_reply_close_a_span_and_open_another(make_engine: Make) -> None:
    engine = make_engine(fresh=True)
    before = asyncio.run(engine.generate(ask(session="", length=30)))

    async def main() -> tuple[GenerateResult, GenerateResult]:
        task = asyncio.create_task(engine.generate(ask(length=30)))
        await turns_of_the_loop(12)
        shift(engine, 0.97)
        await engine.load_weights(WeightSource("shared"), 1)
        mixed = await task
        drawn = mixed.spans[0].token_ids
        rest = await engine.generate(ask((*PROMPT, *drawn), session="rest", length=30 - len(drawn)))
        return mixed, rest

    mixed, rest = asyncio.run(main())
    assert [span.policy_version for span in mixed.spans] == [0, 1]
    count = len(mixed.spans[0].token_ids)
    assert 0 < count < 30
    assert mixed.spans[0].logprobs == before.spans[0].logprobs[:count]
    assert mixed.spans[1] == rest.spans[0]
    assert len(mixed.token_ids) == 30
    # Routes: as drawn, so the old ones for what was fed before the change, the new ones after it.
    assert mixed.routed_experts is not None
    assert before.routed_experts is not None
    assert rest.routed_experts is not None
    fed_before = len(PROMPT) + count - 1
    assert mixed.routed_experts.num_tokens == len(PROMPT) + 30 - 1
    assert mixed.routed_experts.rows(0, fed_before) == before.routed_experts.rows(0, fed_before)
    total = len(PROMPT) + 30 - 1
    assert mixed.routed_experts.rows(fed_before, total) == rest.routed_experts.rows(fed_before, total)


def test_new_weights_invalidate_what_could_have_been_shared(make_engine: Make) -> None:
    engine = make_engine(fresh=True)
    asyncio.run(engine.generate(ask(session="")))
    shift(engine, 1.02)
    asyncio.run(engine.load_weights(WeightSource("shared"), 1))
    after = asyncio.run(engine.generate(ask(session="")))
    assert engine.statistics()["shared_tokens"] == 0
    asyncio.run(engine.load_weights(WeightSource("shared"), 1))
    assert asyncio.run(engine.generate(ask(session=""))) == after


def test_scoring_starts_again_when_weights_change_on_the_way(make_engine: Make) -> None:
    engine = make_engine(fresh=True)
    tokens = tuple(i % 300 for i in range(80))

    async def main() -> None:
        task = asyncio.create_task(engine.score(tokens))
        await turns_of_the_loop(2)
        shift(engine, 1.02)
        await engine.load_weights(WeightSource("shared"), 3)
        mixed = await task
        assert mixed == await engine.score(tokens)
        assert mixed.policy_version == 3

    asyncio.run(main())


def test_an_engine_that_shares_the_learners_weights_reads_no_files(make_engine: Make) -> None:
    with pytest.raises(EngineError, match="shares"):
        asyncio.run(make_engine().load_weights(WeightSource("file", "nowhere"), 1))


# ---- failures


def poison(engine: EmbeddedEngine, token: int) -> None:
    """Whoever feeds `token` gets logits that are not numbers."""
    with torch.no_grad():
        engine.policy.model.get_input_embeddings().weight[token] = float("nan")


def test_one_request_with_bad_logits_ends_alone_and_leaves_nothing_behind(make_engine: Make) -> None:
    engine = make_engine(fresh=True, slots=2)
    good = asyncio.run(engine.generate(ask(session="")))
    poison(engine, 310)

    async def main() -> list[GenerateResult]:
        # Longer than what comes after it in its slot, so that nothing is overwritten by chance.
        bad = engine.generate(ask((*PROMPT, *range(20), 310, 12), session="bad"))
        results = list(await asyncio.gather(bad, engine.generate(ask(session="good"))))
        await engine.end_session("good")
        return results + [await engine.generate(ask(session="")) for _ in range(3)]  # whatever slot they get

    bad, *others = asyncio.run(main())
    assert bad.finish_reason == "error"
    assert "not finite" in str(bad.error)
    assert bad.token_ids == ()
    assert [other.spans for other in others] == [good.spans] * 4
    assert asyncio.run(engine.health()).ok


def test_a_cancelled_request_that_was_not_finite_leaves_nothing_behind(make_engine: Make) -> None:
    engine = make_engine(fresh=True, slots=1)
    good = asyncio.run(engine.generate(ask(session="")))
    poison(engine, 310)

    async def main() -> GenerateResult:
        # Two tiles and a half: cancelled between the passes of its prefill, before any logit is looked at.
        task = asyncio.create_task(engine.generate(ask((310,) * 80, session="bad")))
        await turns_of_the_loop(1)
        engine._scheduler.admit()
        chunks = engine._scheduler.next_tile()
        engine._passes.prefill(chunks)
        engine._scheduler.tile_done(chunks)
        task.cancel()
        return await engine.generate(ask(session=""))

    assert asyncio.run(main()).spans == good.spans


def test_a_failing_pass_fails_every_request_with_its_cause(make_engine: Make) -> None:
    engine = make_engine(fresh=True)

    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    handle = engine.policy.model.register_forward_pre_hook(fail)
    base = engine.policy.model.base_model.register_forward_pre_hook(fail)

    async def main() -> None:
        results = await asyncio.gather(*(engine.generate(ask(session=name)) for name in "ab"), return_exceptions=True)
        for result in results:
            assert isinstance(result, EngineError)
            assert "the device is gone" in str(result)
        health = await engine.health()
        assert not health.ok
        assert health.running == health.waiting == 0
        with pytest.raises(EngineError, match="failed earlier"):
            await engine.generate(ask())

    asyncio.run(main())
    handle.remove()
    base.remove()


# ---- the trainer's modules


def test_sampling_leaves_the_trainers_modules_as_they_were_and_trainable(make_engine: Make) -> None:
    engine = make_engine(fresh=True)
    policy = engine.policy
    policy.train()
    frozen = policy.model.get_input_embeddings()
    frozen.eval()
    asyncio.run(engine.generate(ask()))
    asyncio.run(engine.score(PROMPT))
    assert policy.training
    assert not frozen.training
    assert all(module.training for module in policy.modules() if module is not frozen)
    assert not any(parameter.is_inference() for parameter in policy.parameters())
    policy.eval()
    ids = torch.tensor(PROMPT)
    hidden, _ = policy.trunk(
        ids,
        torch.arange(len(ids)),
        cu_seq_lens_q=torch.tensor([0, len(ids)], dtype=torch.int32),
        cu_seq_lens_k=torch.tensor([0, len(ids)], dtype=torch.int32),
        max_length_q=len(ids),
        max_length_k=len(ids),
    )
    policy.logits(hidden).logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for name, parameter in policy.named_parameters() if "experts" not in name)


def test_one_engine_serves_one_event_loop_after_another(make_engine: Make) -> None:
    engine = make_engine()
    results = [asyncio.run(engine.generate(ask(session=""))) for _ in range(3)]
    assert results[0] == results[1] == results[2]


def test_an_interrupted_event_loop_leaves_a_usable_engine(make_engine: Make) -> None:
    engine = make_engine(slots=1)
    wanted = asyncio.run(engine.generate(ask(session="")))

    async def main() -> None:
        asyncio.create_task(engine.generate(ask(length=60))).add_done_callback(lambda task: task.cancelled())
        await turns_of_the_loop(6)

    asyncio.run(main())  # ends with the request under way, which asyncio.run then cancels
    assert asyncio.run(engine.generate(ask(session=""))) == wanted


def test_scoring_what_is_not_finite_fails_alone_and_leaves_nothing_behind(make_engine: Make) -> None:
    engine = make_engine(fresh=True)
    good = asyncio.run(engine.score(PROMPT))
    poison(engine, 310)
    with pytest.raises(EngineError, match="not finite"):
        asyncio.run(engine.score((*PROMPT, 310, 5, 6)))
    assert asyncio.run(engine.score(PROMPT)) == good


def test_those_who_wait_to_score_get_their_turn_when_one_gives_up(make_engine: Make) -> None:
    engine = make_engine()
    wanted = asyncio.run(engine.score(PROMPT))

    async def main() -> None:
        tasks = [asyncio.create_task(engine.score(tuple(range(80)))) for _ in range(3)]
        last = asyncio.create_task(engine.score(PROMPT))
        await turns_of_the_loop(2)
        tasks[1].cancel()
        tasks[0].cancel()
        assert await last == wanted

    asyncio.run(main())


# ---- giving memory back


def test_memory_given_back_is_taken_again_and_changes_no_bit(make_engine: Make) -> None:
    kept, freeing = make_engine(), make_engine()
    first, second = ask(session="s"), ask((*PROMPT, 5, 6), session="t", seed=9)

    async def main(engine: EmbeddedEngine, *, free: bool) -> list[Any]:
        found: list[Any] = []
        for request in (first, second):
            found += [await engine.generate(request), await engine.score(PROMPT)]
            if free:
                await engine.release_memory()
                assert not engine._cache.is_held
                assert all(tensor.untyped_storage().nbytes() == 0 for tensor in engine._cache.keys)
            else:
                engine._scheduler.invalidate(0)  # what publishing does between two steps
        return found

    assert asyncio.run(main(freeing, free=True)) == asyncio.run(main(kept, free=False))
    assert kept._cache.is_held
    assert kept._cache.num_bytes == freeing._cache.num_bytes == kept.capabilities().cache_bytes > 0


def test_a_session_goes_on_after_memory_was_given_back(make_engine: Make) -> None:
    engine = make_engine()

    async def main() -> tuple[GenerateResult, GenerateResult]:
        begun = await engine.generate(ask(session="s"))
        await engine.release_memory()
        longer = (*PROMPT, *begun.token_ids, 5)
        return await engine.generate(ask(longer, session="s", seed=8)), await engine.generate(ask(longer, seed=8))

    continued, fresh = asyncio.run(main())
    assert continued.num_cached_tokens == 0
    assert continued.spans == fresh.spans


def test_memory_in_use_is_not_given_back(make_engine: Make) -> None:
    engine = make_engine()

    async def main() -> None:
        for busy in (engine.generate(ask()), engine.score(PROMPT)):
            await engine.pause()
            task = asyncio.create_task(busy)
            await turns_of_the_loop(1)
            with pytest.raises(EngineError, match="under way"):
                await engine.release_memory()
            await engine.resume()
            await task
            assert engine._cache.is_held

    asyncio.run(main())
