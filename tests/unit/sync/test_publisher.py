"""When a push is checked, over a run: a real learner, an engine that may ignore what it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from keel.config import EngineConfig, LearnerConfig, ModelConfig
from keel.config_sync import SyncConfig
from keel.learner.learner import Learner
from keel.models.policy import PolicyModel
from keel.sync.check import StaleWeightsError
from keel.sync.groups import tensor_groups
from keel.sync.publisher import Publisher
from tests.deaf_engine import DeafEngine

CAPACITY = 96


@pytest.fixture(scope="module")
def path(tiny_checkpoint: Callable[..., str]) -> str:
    return tiny_checkpoint("qwen3", num_hidden_layers=1)


def run(path: str, *, steps: int, deaf: bool = False, attached: bool = False, **options: Any) -> list[int]:
    """The numbers of the publishes that were checked: one before the first step, one after each, as a run does."""
    learner = Learner(ModelConfig(path=path), LearnerConfig())
    policy = PolicyModel.load(path)
    engine = DeafEngine(policy, EngineConfig(slots=2), max_sequence_tokens=CAPACITY, shares_weights=False)
    engine.deaf = tuple(tensor_groups(policy.trained_parameters())) if deaf else ()
    publisher = Publisher(
        SyncConfig(check_tokens=64, **options),
        run=asyncio.run,
        dtype="float32",
        vocab_size=256,
        window=0,
        attached=attached,
        may_perturb=True,
    )
    checked = []
    for number in range(steps + 1):
        if number > 0:
            learner.change_weights(learner.weight_names(), "noise", number)
        if publisher.publish(learner, engine):
            checked.append(number)
    return checked


def test_an_engine_that_ignores_every_push_stops_a_short_run(path: str) -> None:
    with pytest.raises(StaleWeightsError) as caught:
        run(path, steps=3, deaf=True)
    assert set(caught.value.groups) >= {"embed", "attention.q_proj"}


@pytest.mark.parametrize(
    ("options", "steps", "checked"),
    [
        ({}, 3, [1]),
        ({}, 10, [1, 10]),
        ({"check_every": 3}, 6, [1, 3, 6]),
        ({"check_every": 1}, 2, [1, 2]),
        ({"check_every": 0}, 2, []),
        ({"attached": True}, 1, [0, 1]),  # nobody knows what the server held
    ],
)
def test_the_first_update_is_checked_and_then_it_goes_by_the_schedule(
    path: str, options: dict[str, Any], steps: int, checked: list[int]
) -> None:
    assert run(path, steps=steps, **options) == checked
