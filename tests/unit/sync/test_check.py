"""The weight check on a real learner and real engines, some of which take weights wrongly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from keel.config import EngineConfig, LearnerConfig, ModelConfig
from keel.engines.base import EngineError, ScoreResult
from keel.learner.learner import Learner
from keel.models.policy import PolicyModel
from keel.sync.base import SyncError
from keel.sync.check import Gap, StaleWeightsError, WeightCheck, check_sequences
from keel.sync.publish import publish_async
from tests.deaf_engine import DeafEngine

CAPACITY = 96
SEQUENCES = check_sequences(num_tokens=180, vocab_size=256, window=32, capacity=CAPACITY)


class SilentEngine(DeafEngine):
    """A plug-in that cannot score given tokens."""

    error: Exception

    async def score(self, token_ids: tuple[int, ...]) -> ScoreResult:
        raise self.error


def pair(path: str, dtype: str, **faults: Any) -> tuple[Learner, DeafEngine]:
    learner = Learner(ModelConfig(path=path, dtype=dtype), LearnerConfig())
    policy = PolicyModel.load(path, dtype=dtype)
    engine = DeafEngine(policy, EngineConfig(slots=2), max_sequence_tokens=CAPACITY, shares_weights=False)
    for name, value in faults.items():
        setattr(engine, name, value)
    return learner, engine


def check(
    learner: Learner, engine: DeafEngine, dtype: str, *, noise: float = 0.2, may: bool = True
) -> dict[str, float]:
    """A check of both at their start, then a push of other weights and a check of that."""
    watch = WeightCheck(SEQUENCES, dtype=dtype, may_perturb=may)

    async def push() -> None:
        await publish_async(learner, engine, 1)

    async def both() -> dict[str, float]:
        await watch.measure_baseline(learner, engine)
        with torch.no_grad():
            for parameter in learner.parameters().values():
                parameter.add_(noise * parameter.float().std().nan_to_num(0.1) * torch.randn_like(parameter))
        await push()
        return await watch.run(learner, engine, push)

    torch.manual_seed(5)
    return asyncio.run(both())


@pytest.fixture(scope="module")
def paths(tiny_checkpoint: Callable[..., str]) -> dict[str, str]:
    return {
        "gpt_oss": tiny_checkpoint("gpt_oss", num_hidden_layers=2),
        "qwen3_moe": tiny_checkpoint("qwen3_moe", num_hidden_layers=2),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3_moe"])
def test_what_arrived_passes(paths: dict[str, str], preset: str, dtype: str) -> None:
    figures = check(*pair(paths[preset], dtype), dtype)
    assert figures["sync/check_abs_median"] <= figures["sync/check_tolerance"]
    assert figures["sync/check_tolerance"] <= (1e-5 if dtype == "float32" else 0.1)


@pytest.mark.parametrize(
    ("preset", "groups", "dtype"),
    [
        ("gpt_oss", ("experts.gate_up_proj_bias", "experts.down_proj"), "float32"),
        ("gpt_oss", ("attention.sinks",), "bfloat16"),
        ("qwen3_moe", ("attention.k_proj",), "float32"),
        ("qwen3_moe", ("router", "final_norm"), "bfloat16"),
    ],
)
def test_stale_groups_are_named(paths: dict[str, str], preset: str, groups: tuple[str, ...], dtype: str) -> None:
    learner, engine = pair(paths[preset], dtype, deaf=groups)
    with pytest.raises(StaleWeightsError) as caught:
        check(learner, engine, dtype, noise=1.0)
    assert set(caught.value.groups) == set(groups)
    assert all(group in str(caught.value) for group in groups)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_groups_written_in_a_wrong_order_are_named(paths: dict[str, str], dtype: str) -> None:
    learner, engine = pair(paths["qwen3_moe"], dtype, garbled=("experts.gate_up_proj", "experts.down_proj"))
    with pytest.raises(StaleWeightsError) as caught:
        check(learner, engine, dtype)
    assert set(caught.value.groups) >= {"experts.gate_up_proj", "experts.down_proj"}
    innocent = {"embed", "head", "attention.q_proj", "post_attention_layernorm", "final_norm"}
    assert not innocent & set(caught.value.groups)


def test_a_tied_embedding_that_arrives_in_one_of_its_places_is_named_alone(
    tiny_checkpoint: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after vLLM's own reload, whose head keeps a packed copy. With the last norm at zero both sides agree too."""
    learner, engine = pair(tiny_checkpoint("qwen3", num_hidden_layers=2), "float32")
    packed = engine.policy.head.weight.detach().clone()
    monkeypatch.setitem(vars(engine.policy), "logits", lambda hidden: torch.nn.functional.linear(hidden, packed))
    with pytest.raises(StaleWeightsError) as caught:
        check(learner, engine, "float32")
    assert caught.value.groups == ("embed",)


def test_the_learner_is_itself_again_and_the_engine_has_its_weights(paths: dict[str, str]) -> None:
    learner, engine = pair(paths["gpt_oss"], "float32", deaf=("attention.sinks",))
    with pytest.raises(StaleWeightsError):
        check(learner, engine, "float32")
    mine, theirs = learner.parameters(), engine.policy.trained_parameters()
    different = {name for name in mine if not torch.equal(mine[name], theirs[name])}
    assert {name.rpartition(".")[2] for name in different} == {"sinks"}


def test_nothing_is_tried_out_where_it_is_not_allowed(paths: dict[str, str]) -> None:
    learner, engine = pair(paths["gpt_oss"], "float32", deaf=("attention.sinks",))
    with pytest.raises(StaleWeightsError, match="allow_weight_push") as caught:
        check(learner, engine, "float32", may=False)
    assert caught.value.groups == ()


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.sinks", "model.layers.0.mlp.experts.down_proj"])
def test_one_stale_layer_of_many_stops_the_run_too(tiny_checkpoint: Callable[..., str], name: str) -> None:
    learner, engine = pair(tiny_checkpoint("gpt_oss", num_hidden_layers=6), "float32", deaf_tensors=(name,))
    with pytest.raises(StaleWeightsError):
        check(learner, engine, "float32")


@pytest.mark.parametrize("error", [NotImplementedError(), EngineError("only draws")], ids=lambda e: type(e).__name__)
def test_an_engine_that_cannot_score_is_told_how_to_go_on(paths: dict[str, str], error: Exception) -> None:
    learner = Learner(ModelConfig(path=paths["gpt_oss"]), LearnerConfig())
    policy = PolicyModel.load(paths["gpt_oss"])
    engine = SilentEngine(policy, EngineConfig(slots=2), max_sequence_tokens=CAPACITY, shares_weights=False)
    engine.error = error
    with pytest.raises(SyncError) as caught:
        check(learner, engine, "float32")
    text = str(caught.value)
    assert "weight check: engine 'embedded' gives no log-probs" in text
    assert f"{type(error).__name__}: {error or 'no more is said'}" in text
    assert "`score`" in text
    assert "sync.check_every = 0" in text
    assert caught.value.__cause__ is error
    assert not isinstance(caught.value, StaleWeightsError)


def test_weights_that_are_no_numbers_are_told(paths: dict[str, str]) -> None:
    learner, engine = pair(paths["gpt_oss"], "float32")
    with torch.no_grad():
        learner.parameters()["model.norm.weight"][3] = float("nan")
    with pytest.raises(StaleWeightsError, match="NaN"):
        check(learner, engine, "float32", noise=0.0)


def test_another_cause_is_warned_of_and_stops_nothing(
    paths: dict[str, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, engine = pair(paths["gpt_oss"], "float32")
    head = engine.policy.head
    monkeypatch.setattr(
        type(engine.policy), "logits", lambda self, hidden: 1.1 * torch.nn.functional.linear(hidden, head.weight)
    )
    watch = WeightCheck(SEQUENCES, dtype="float32", may_perturb=True)

    async def push() -> None:
        await publish_async(learner, engine, 1)

    figures = asyncio.run(watch.run(learner, engine, push))
    assert figures["sync/check_abs_median"] > 1e-3
    assert "weights are not the cause" in caplog.text


def test_a_stack_that_was_apart_from_the_start_hides_no_stale_weights(
    paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, engine = pair(paths["gpt_oss"], "float32", deaf=("attention.q_proj",))
    head = engine.policy.head  # wrong by more than the stale group alone makes
    monkeypatch.setattr(
        type(engine.policy), "logits", lambda self, hidden: 1.5 * torch.nn.functional.linear(hidden, head.weight)
    )
    with pytest.raises(StaleWeightsError) as raised:
        check(learner, engine, "float32", noise=0.05)
    assert raised.value.groups == ("attention.q_proj",)


def test_tokens_are_fixed_cover_the_vocabulary_and_reach_past_the_window() -> None:
    sequences = check_sequences(num_tokens=512, vocab_size=200_000, window=128, capacity=1024)
    assert sequences == check_sequences(num_tokens=512, vocab_size=200_000, window=128, capacity=1024)
    assert all(len(sequence) > 2 * 128 for sequence in sequences)
    drawn = sorted(token for sequence in sequences for token in sequence)
    assert drawn[0] < 500
    assert drawn[-1] > 199_000
    assert max(b - a for a, b in pairwise(drawn)) < 500
    assert len(check_sequences(num_tokens=64, vocab_size=300, window=128, capacity=40)[0]) == 39


def test_a_gap_is_between_the_same_tokens() -> None:
    gap = Gap.between(((-1.0, -2.0),), ((-1.0, -2.5),))
    assert (gap.mean, gap.max, gap.finite) == (0.25, 0.5, True)
    with pytest.raises(Exception, match="2 log-probs from one side, 1"):
        Gap.between(((-1.0, -2.0),), ((-1.0,),))
