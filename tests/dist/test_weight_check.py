"""The weight check of a learner of several ranks: each scores, changes and sends the same, in the same order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch

from keel.config import EngineConfig, LearnerConfig, ModelConfig
from keel.learner.group import LearnerGroup
from keel.models.policy import PolicyModel
from keel.sync.check import StaleWeightsError, WeightCheck, check_sequences
from keel.sync.publish import publish_async
from tests.deaf_engine import DeafEngine

CAPACITY = 96
SEQUENCES = check_sequences(num_tokens=70, vocab_size=256, window=32, capacity=CAPACITY)


def test_stale_groups_are_named_and_the_shards_are_themselves_again(tiny_checkpoint: Callable[..., str]) -> None:
    path = tiny_checkpoint("gpt_oss", num_hidden_layers=2)
    policy = PolicyModel.load(path)
    engine = DeafEngine(policy, EngineConfig(slots=2), max_sequence_tokens=CAPACITY, shares_weights=False)
    with torch.no_grad():  # what it has is not what the learner has, so that it shows what does not arrive
        for name, parameter in policy.trained_parameters().items():
            parameter.add_(1.0 if name.endswith("sinks") else 0.02)
    with LearnerGroup(ModelConfig(path=path), LearnerConfig(ranks=2)) as learner:
        before = learner.score_tokens(SEQUENCES)

        async def push() -> None:
            await publish_async(learner, engine, 1)

        async def pushed_and_checked() -> dict[str, float]:
            await push()
            return await WeightCheck(SEQUENCES, dtype="float32", may_perturb=True).run(learner, engine, push)

        engine.deaf = ("attention.sinks",)
        with pytest.raises(StaleWeightsError) as caught:
            asyncio.run(pushed_and_checked())
        assert caught.value.groups == ("attention.sinks",)
        assert learner.score_tokens(SEQUENCES) == before

        engine.deaf = ()
        figures = asyncio.run(pushed_and_checked())
        assert figures["sync/check_abs_median"] <= 1e-5
