"""A request's tokens, log-probs and routes do not depend, by one bit, on anything but the request."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from keel.config import EngineConfig
from keel.engines.embedded import EmbeddedEngine
from keel.models.policy import PolicyModel

Make = Callable[..., EmbeddedEngine]
KINDS = [("gpt_oss", "float32"), ("gpt_oss", "bfloat16"), ("qwen3_moe", "float32"), ("qwen3", "bfloat16")]


@pytest.mark.parametrize(("preset", "dtype"), KINDS)
def test_neighbours_order_slots_and_slow_tools_change_nothing(
    make_engine: Make, random_episode: Any, run_episodes: Any, preset: str, dtype: str
) -> None:
    def engine() -> EmbeddedEngine:
        return make_engine(preset, dtype, slots=7)

    vocab_size = engine().policy.info.vocab_size
    # Three attempts at each task, so that prompts are shared; fewer slots than episodes, so that some wait.
    everybody = [random_episode(number, vocab_size, prompt_of=100 + number // 3) for number in range(41)]
    chosen = everybody[3:41:6]
    alone = {episode.name: run_episodes(engine(), [episode])[episode.name] for episode in chosen}
    assert sum(len(result.token_ids) for results in alone.values() for result in results) > 50

    together = run_episodes(engine(), everybody)
    among_three = run_episodes(engine(), [*everybody[:3], *chosen[:1]])
    slow = [dataclasses.replace(episode, loop_turns=i % 5 * 7) for i, episode in enumerate(everybody)]
    backwards_and_slow = run_episodes(engine(), slow[::-1])
    for name, results in alone.items():
        assert together[name] == results
        assert backwards_and_slow[name] == results
    assert among_three[chosen[0].name] == alone[chosen[0].name]


def test_on_two_threads_the_slot_does_not_matter_either(
    make_engine: Make, random_episode: Any, run_episodes: Any
) -> None:
    """Three query heads to a key head: the attention kernel's products of three rows differ from thread to thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        vocab_size = make_engine().policy.info.vocab_size
        everybody = [random_episode(number, vocab_size) for number in range(24)]
        together = run_episodes(make_engine(slots=32), everybody)
        for episode in everybody[17::6]:  # alone in slot 0, hence on the first thread; here in slots of the second
            assert run_episodes(make_engine(slots=32), [episode])[episode.name] == together[episode.name]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("num_experts", [13, 24])  # few: all computed at once; many: sorted by expert
def test_experts_do_not_see_who_else_chose_them(
    tiny_checkpoint: Callable[..., str], random_episode: Any, run_episodes: Any, num_experts: int
) -> None:
    """With many experts few rows choose the same; a product of fewer than four rows has other bits than one of more."""
    policy = PolicyModel.load(tiny_checkpoint("gpt_oss", num_hidden_layers=2, num_local_experts=num_experts))

    def engine() -> EmbeddedEngine:
        return EmbeddedEngine(policy, EngineConfig(slots=32, prefill_tile=32), max_sequence_tokens=64)

    everybody = [random_episode(number, policy.info.vocab_size) for number in range(16)]
    together = run_episodes(engine(), everybody)
    for episode in everybody[::4]:
        assert run_episodes(engine(), [episode])[episode.name] == together[episode.name]


def test_an_engine_that_has_seen_much_gives_the_same_as_a_fresh_one(
    make_engine: Make, random_episode: Any, run_episodes: Any
) -> None:
    engine = make_engine(slots=4)
    vocab_size = engine.policy.info.vocab_size
    target = random_episode(3, vocab_size, turns=3)
    fresh = run_episodes(make_engine(slots=4), [target])[target.name]
    run_episodes(engine, [random_episode(number, vocab_size) for number in range(50, 70)])
    assert run_episodes(engine, [target])[target.name] == fresh


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sharing_a_prompt_changes_nothing_but_the_work(
    make_engine: Make, random_episode: Any, run_episodes: Any, dtype: str
) -> None:
    engine = make_engine("gpt_oss", dtype, slots=16)
    vocab_size = engine.policy.info.vocab_size
    group = [
        dataclasses.replace(random_episode(number, vocab_size), contexts=(tuple(range(7, 36)), (5, 4)))
        for number in range(16)
    ]
    shared = run_episodes(engine, group)
    # 29 prompt tokens: three whole chunks of 8 are copied by the 15 that come after the first.
    assert engine.statistics()["shared_tokens"] == 15 * 24
    for episode in group[::5]:
        lonely = make_engine("gpt_oss", dtype, slots=16)
        results = run_episodes(lonely, [episode])[episode.name]
        assert lonely.statistics()["shared_tokens"] == 0
        assert shared[episode.name] == results
        assert results[0].routes_start == 0
        assert results[0].routed_experts is not None
        assert results[0].routed_experts.num_tokens == 29 + len(results[0].token_ids) - 1


def test_the_same_seed_draws_the_same_and_another_does_not(
    make_engine: Make, random_episode: Any, run_episodes: Any
) -> None:
    engine = make_engine()
    first = random_episode(4, engine.policy.info.vocab_size)
    again = dataclasses.replace(first, name="again")
    other = dataclasses.replace(first, name="other", seed=first.seed + 1)
    results = run_episodes(engine, [first, again, other])
    assert [r.token_ids for r in results[first.name]] == [r.token_ids for r in results["again"]]
    assert [r.token_ids for r in results[first.name]] != [r.token_ids for r in results["other"]]
