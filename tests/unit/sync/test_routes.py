"""Each route into an engine in a process of its own, and what happens when one end fails. Real processes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from keel.config import EngineConfig, LearnerConfig, ModelConfig
from keel.engines.base import EngineError, WeightSource
from keel.engines.process import EngineProcess
from keel.learner.learner import Learner
from keel.sync.base import SyncError
from keel.sync.publish import choose_transport, publish_async
from keel.sync.transports import send_weights

TOKENS = tuple(range(40, 70))


def start(path: str, **lora: int) -> EngineProcess:
    model = ModelConfig(path=path, lora=lora)
    return EngineProcess(model, EngineConfig(slots=2), max_sequence_tokens=64, num_threads=1)


@pytest.fixture(scope="module")
def path(tiny_checkpoint: Callable[..., str]) -> str:
    return tiny_checkpoint("gpt_oss", num_hidden_layers=2)


@pytest.fixture(scope="module")
def engine(path: str) -> Iterator[EngineProcess]:
    process = start(path)
    yield process
    process.stop()


def changed(path: str, seed: int) -> Learner:
    learner = Learner(ModelConfig(path=path), LearnerConfig())
    learner.change_weights(learner.weight_names(), "noise", seed)
    return learner


def apart(learner: Learner, engine: EngineProcess) -> float:
    theirs = asyncio.run(engine.score(TOKENS)).logprobs
    return max(abs(a - b) for a, b in zip(learner.score_tokens([TOKENS])[0], theirs, strict=True))


@pytest.mark.parametrize("transport", ["file", "gloo"])
def test_the_engine_samples_from_what_was_sent(path: str, engine: EngineProcess, transport: str) -> None:
    learner = changed(path, 3 if transport == "file" else 4)
    assert apart(learner, engine) > 0.1
    asyncio.run(publish_async(learner, engine, 7, transport=transport))
    assert apart(learner, engine) < 1e-5
    assert asyncio.run(engine.health()).policy_version == 7


def test_two_pushes_at_once_leave_one_of_them_whole(path: str, engine: EngineProcess) -> None:
    first, second = changed(path, 5), changed(path, 6)

    async def both() -> None:
        pushes = (publish_async(learner, engine, 8, transport="gloo") for learner in (first, second))
        await asyncio.gather(*pushes)

    asyncio.run(both())
    assert min(apart(first, engine), apart(second, engine)) < 1e-5


def test_a_broadcast_that_does_not_fit_is_refused_on_both_sides(path: str, engine: EngineProcess) -> None:
    learner = changed(path, 7)
    asyncio.run(publish_async(learner, engine, 9))

    class Wrong:
        def __init__(self) -> None:
            self.told = ""

        def weights_to(self, source: WeightSource) -> None:
            with pytest.raises(SyncError) as caught:
                send_weights(source.location, {"made_up": torch.zeros(2)}, version=10, timeout_s=60)
            self.told = str(caught.value)

    wrong = Wrong()
    with pytest.raises(SyncError, match=r"missing: lm_head.*unexpected: made_up"):
        asyncio.run(publish_async(wrong, engine, 10, transport="gloo"))
    assert "refused: " in wrong.told
    assert "missing: lm_head" in wrong.told
    assert apart(learner, engine) < 1e-5
    assert asyncio.run(engine.health()).policy_version == 9


def test_an_engine_that_is_gone_lets_the_sender_go(path: str) -> None:
    process = start(path)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="killed"):
        asyncio.run(publish_async(changed(path, 8), process, 1, transport="gloo"))
    process.stop()


def test_an_engine_that_dies_while_it_receives_lets_the_sender_go(path: str) -> None:
    process = start(path)

    class Killer:
        """Kills the receiver when it has joined and waits for the first tensor."""

        def __init__(self) -> None:
            self.told = ""

        def weights_to(self, source: WeightSource) -> None:
            os.kill(process.pid, signal.SIGKILL)
            with pytest.raises(SyncError) as caught:
                send_weights(source.location, {"w": torch.zeros(2)}, version=1, timeout_s=60)
            self.told = str(caught.value)

    sender = Killer()
    with pytest.raises(EngineError, match="killed"):
        asyncio.run(publish_async(sender, process, 1, transport="gloo"))
    assert "called off" in sender.told
    process.stop()


def test_of_an_adapter_the_factors_go_with_a_note_of_what_they_are_on(path: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    learner = Learner(ModelConfig(path=path, lora={"rank": 3, "alpha": 6}), LearnerConfig())
    learner.weights_to(WeightSource("file", str(tmp_path)))
    with safe_open(str(tmp_path / "weights.safetensors"), framework="pt") as file:
        assert set(file.keys()) == set(learner.weight_names())
        import json

        entries = json.loads(file.metadata()["adapter"])
    assert {end for entry in entries for end in (entry["down"], entry["up"])} == set(learner.weight_names())
    shapes = dict(learner.policy.model.named_parameters())
    plain = dict(Learner(ModelConfig(path=path), LearnerConfig()).parameters())
    merged = Learner(ModelConfig(path=path, lora={"rank": 3, "alpha": 6}), LearnerConfig())
    for learner_or_merged in (learner, merged):
        learner_or_merged.change_weights(learner.weight_names(), "noise", 2)
    merged.policy.merge_adapter()
    after = dict(merged.policy.model.named_parameters())
    for entry in entries:
        down, up = shapes[entry["down"]].detach().double(), shapes[entry["up"]].detach().double()
        if entry["num_experts"]:
            down, up = (
                down.view(entry["num_experts"], -1, down.shape[1]),
                up.view(up.shape[0], -1, entry["num_experts"]),
            )
            delta = torch.einsum("ore,eri->eoi" if entry["swapped"] else "ore,eri->eio", up, down)
        else:
            delta = up @ down
        expected = plain[entry["weight"]].double() + entry["scale"] * delta
        torch.testing.assert_close(after[entry["weight"]].detach().double(), expected, atol=1e-5, rtol=1e-5)


def test_what_an_engine_cannot_take_is_refused_in_words() -> None:
    class Capabilities:
        name, shares_weights, weight_sources, weight_problem = "some", False, ("gloo",), ""

    assert choose_transport("auto", Capabilities) == "gloo"
    with pytest.raises(SyncError, match=r"'some' takes weights from \['gloo'\].*'nccl'.*sync.transport"):
        choose_transport("nccl", Capabilities)
