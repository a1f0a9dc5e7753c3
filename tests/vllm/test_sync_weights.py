"""Weights into a real vLLM: every tensor group of three kinds of model, and what vLLM's own reload does instead.

Sizes differ pairwise (hidden, intermediate, heads x head size, experts, vocabulary), so that nothing transposed fits.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from keel.config import LearnerConfig, ModelConfig
from keel.engines.base import GenerateResult, WeightSource
from keel.engines.vllm.engine import VllmEngine
from keel.learner.learner import Learner
from keel.sync.base import SyncError
from keel.sync.check import Gap, StaleWeightsError, WeightCheck, check_sequences
from keel.sync.groups import tensor_groups
from keel.sync.publish import publish_async
from keel.sync.transports import write_weights
from keel.types import SamplingSettings
from tests.vllm_servers import CAPACITY, SHAPES, VOCAB_SIZE, OneEngine, ask, tokens_drawn, until_drawn

pytestmark = pytest.mark.vllm

WRONG_BY = {"float32": 1e-5, "bfloat16": 0.05}
"""Median difference of log-probs that rounding explains."""
SEEN_BY = {"float32": 0.01, "bfloat16": 0.2}
"""Least median by which a group's change must move the learner's own log-probs, to be seen above that."""
MOST_CHANGES = 20
NEARLY_ALL = {"float32": 1e-4, "bfloat16": 0.5}
"""What 98 of 100 tokens keep to: near-ties between experts, decided by rounding, are among the others."""
STALE_BY_RELOAD = {
    "gpt_oss": {
        "attention.sinks",
        *("experts.gate_up_proj", "experts.gate_up_proj_bias", "experts.down_proj", "experts.down_proj_bias"),
    },
    "qwen3": {"embed"},  # tied: the head keeps a packed copy of its own
    "qwen3_moe": {"experts.gate_up_proj", "experts.down_proj"},
}


@dataclass
class Stack:
    """A server, and where its model came from."""

    preset: str
    dtype: str
    path: str
    engine: VllmEngine

    def learner(self, seed: int, **lora: Any) -> Learner:
        """A learner whose weights are not those the server was started with."""
        learner = Learner(ModelConfig(path=self.path, dtype=self.dtype, lora=lora), LearnerConfig(), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in learner.parameters().values():
                size = parameter.float().square().mean().sqrt().clamp_min(0.02)
                parameter.add_((0.2 * size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
        return learner

    def push(self, learner: Learner, version: int, transport: str = "file") -> None:
        asyncio.run(publish_async(learner, self.engine, version, transport=transport))

    def gap(self, learner: Learner) -> Gap:
        async def scores() -> tuple[tuple[float, ...], ...]:
            return tuple([(await self.engine.score(sequence)).logprobs for sequence in SEQUENCES])

        return Gap.between(learner.score_tokens(SEQUENCES), asyncio.run(scores()))

    def push_group_by_group(self, learner: Learner, version: int) -> dict[str, tuple[float, float]]:
        """Each group changed alone, as often as it takes to be seen, and pushed: the gap then, and how far the change
        moved the learner."""
        figures = {}
        before = learner.score_tokens(SEQUENCES)
        for index, (group, names) in enumerate(tensor_groups(learner.weight_names()).items()):
            moved = 0.0
            for again in range(MOST_CHANGES):
                learner.change_weights(names, "noise", 100 * index + again)
                moved = Gap.between(before, learner.score_tokens(SEQUENCES)).median
                if moved >= SEEN_BY[self.dtype]:
                    break
            self.push(learner, version + index)
            figures[group] = (self.gap(learner).median, moved)
            learner.restore_weights()
        return figures

    @property
    def tolerance(self) -> float:
        return WRONG_BY[self.dtype]


def show(stack: Stack, what: str, figures: dict[str, Any]) -> None:
    """For the pages that quote them: `pytest -rP` prints what tests print."""
    print(f"{stack.preset} {stack.dtype}: {what}")
    for name, values in figures.items():
        print(f"  {name:30}", *(f"{value:.3g}" for value in values))


SEQUENCES = check_sequences(num_tokens=360, vocab_size=VOCAB_SIZE, window=32, capacity=CAPACITY)


@pytest.fixture(scope="module", params=[(p, d) for p in SHAPES for d in WRONG_BY], ids="-".join)
def stack(request: pytest.FixtureRequest, one_engine: OneEngine, vllm_model: Callable[..., str]) -> Iterator[Stack]:
    preset, dtype = request.param
    engine = one_engine(preset, dtype)
    yield Stack(preset, dtype, vllm_model(preset), engine)
    asyncio.run(engine.close())  # its weights are nobody's any more


def test_every_tensor_group_arrives(stack: Stack) -> None:
    """Changed one at a time and pushed: the gap stays what it was with the change, which alone is far larger."""
    learner = stack.learner(1)
    assert stack.gap(learner).median > 3 * stack.tolerance
    stack.push(learner, 1)
    assert stack.gap(learner).median <= stack.tolerance
    figures = stack.push_group_by_group(learner, 2)
    show(stack, "gap after its push, and what its change moves", figures)
    assert {group: pair for group, pair in figures.items() if pair[0] > stack.tolerance} == {}
    assert {group: pair for group, pair in figures.items() if pair[1] < SEEN_BY[stack.dtype]} == {}


def test_a_broadcast_brings_the_same(stack: Stack) -> None:
    learner = stack.learner(2)
    stack.push(learner, 50, "gloo")
    by_broadcast = stack.gap(learner)
    stack.push(learner, 51, "file")
    assert by_broadcast == stack.gap(learner)
    assert by_broadcast.median <= stack.tolerance
    assert asyncio.run(stack.engine.score(SEQUENCES[0])).policy_version == 51


def test_of_an_adapter_the_factors_are_enough(stack: Stack) -> None:
    learner = stack.learner(3, rank=4, alpha=8)
    sent = sum(parameter.numel() for parameter in learner.parameters().values())
    assert sent < sum(parameter.numel() for parameter in learner.policy.model.parameters()) / 3
    base = Learner(ModelConfig(path=stack.path, dtype=stack.dtype), LearnerConfig())
    stack.push(base, 59)
    first = {"float32": 1.0, "bfloat16": 3.0}[stack.dtype]
    for version, strength in ((60, first), (61, 1.5)):  # the second is added to the base, not to the first
        with torch.no_grad():
            for parameter in learner.parameters().values():
                parameter.mul_(strength)
        stack.push(learner, version)
        assert Gap.between(base.score_tokens(SEQUENCES), learner.score_tokens(SEQUENCES)).median > 3 * stack.tolerance
        assert stack.gap(learner).median <= stack.tolerance
    figures = stack.push_group_by_group(learner, 62)
    show(stack, "adapter: gap after its push, and what its change moves", figures)
    assert {group: pair for group, pair in figures.items() if pair[0] > stack.tolerance} == {}
    assert {group: pair for group, pair in figures.items() if pair[1] < SEEN_BY[stack.dtype]} == {}


def test_what_does_not_fit_changes_nothing(stack: Stack, tmp_path: Path) -> None:
    learner = stack.learner(4)
    stack.push(learner, 70)
    before = asyncio.run(stack.engine.score(SEQUENCES[0]))
    weights = {name: parameter.detach() for name, parameter in learner.parameters().items()}
    name = "model.layers.1.self_attn.v_proj.weight"
    wrong: list[tuple[dict[str, torch.Tensor], str]] = [
        ({key: value for key, value in weights.items() if key != name}, f"missing: {name}"),
        ({**weights, "model.layers.9.made_up": torch.zeros(3)}, "model.layers.9.made_up"),
        ({**weights, name: weights[name].t().contiguous()}, name),
        ({**weights, name: weights[name].double()}, "torch.float64"),
    ]
    for index, (tensors, told) in enumerate(wrong):
        place = tmp_path / str(index)
        write_weights(place, tensors, version=71)
        with pytest.raises(SyncError, match=told):
            asyncio.run(stack.engine.load_weights(WeightSource("file", str(place)), 71))
    after = asyncio.run(stack.engine.score(SEQUENCES[0]))
    assert (after.logprobs, after.policy_version) == (before.logprobs, 70)


Halved = list[tuple[tuple[int, ...], GenerateResult]]
"""Prompts and answers that are of two policies."""


def drawn_across_a_switch(stack: Stack, old: Learner, ready: WeightSource, version: int) -> Halved:
    """Three clients ask again and again until they meet the weights at `ready`, which come as `version` + 1.

    Three, because more answers at a time keep the server's front busier than its workers, who are then found idle.
    """
    stack.push(old, version)

    async def meet_new_weights(number: int) -> tuple[tuple[int, ...], GenerateResult]:
        prompt = SEQUENCES[number % len(SEQUENCES)][number : number + 16]
        for seed in itertools.count(number):
            length = CAPACITY - 16 - 20 * number
            result = await stack.engine.generate(ask(prompt, length=length, seed=seed, sampling=SamplingSettings(1.0)))
            assert len(result.token_ids) == length
            if result.spans[-1].policy_version == version + 1:
                return prompt, result
        raise AssertionError

    async def switched() -> Halved:
        drawn = await tokens_drawn(stack.engine)
        clients = [asyncio.create_task(meet_new_weights(number)) for number in range(3)]
        await until_drawn(stack.engine, drawn + 8 * len(clients))
        await stack.engine.pause()  # else a fast server may finish them all before it has read the weights
        await stack.engine.load_weights(ready, version + 1)
        await stack.engine.resume()
        return await asyncio.gather(*clients)

    met = asyncio.run(switched())
    of = {tuple(span.policy_version for span in result.spans) for _, result in met}
    assert of <= {(version, version + 1), (version + 1,)}
    return [(prompt, result) for prompt, result in met if len(result.spans) == 2]


def test_tokens_drawn_after_a_switch_are_the_new_weights_with_their_own_keys(stack: Stack, tmp_path: Path) -> None:
    """Before the switch all tokens are the old weights', after it the new ones'; a single key kept from the old would
    show in every token after it. Switched until somebody was in the middle of an answer: the pause cannot be aimed."""
    old, new = stack.learner(5), stack.learner(6)
    ready = WeightSource("file", str(tmp_path))
    new.weights_to(ready)  # beforehand: while this process writes, the server answers
    tries = (drawn_across_a_switch(stack, old, ready, version) for version in range(80, 120, 2))
    halved = next((tried for tried in tries if tried), None)
    assert halved, "nobody was ever in the middle of an answer"
    results = [result for _, result in halved]
    sequences = [(*prompt, *result.token_ids) for prompt, result in halved]
    starts = [(15, 15 + len(result.spans[0].token_ids)) for result in results]
    apart = {}
    for name, learner in (("old", old), ("new", new)):
        scores = learner.score_tokens(sequences)
        for number, half in enumerate(("before", "after")):
            told = [result.spans[number].logprobs for result in results]
            scored = [row[start[number] :][: len(one)] for row, start, one in zip(scores, starts, told, strict=True)]
            gaps = (torch.tensor(sum(scored, ())) - torch.tensor(sum(told, ()))).abs()
            apart[f"{half}, {name} weights"] = gaps
    show(stack, "mean, median, 99 %, largest, tokens", {name: spread(gaps) for name, gaps in apart.items()})
    for right, wrong in (("before, old", "before, new"), ("after, new", "after, old")):
        gaps = apart[f"{right} weights"]
        assert gaps.median() <= stack.tolerance
        assert gaps.quantile(0.98) <= NEARLY_ALL[stack.dtype]
        assert apart[f"{wrong} weights"].median() > 4 * stack.tolerance


def spread(gaps: torch.Tensor) -> tuple[float, ...]:
    return (*map(float, (gaps.mean(), gaps.median(), gaps.quantile(0.99), gaps.max())), len(gaps))


class StockReload:
    """A vLLM engine that takes weights by vLLM's own `reload_weights` from a checkpoint: 200, whatever comes of it."""

    def __init__(self, stack: Stack, learner: Learner, directory: Path) -> None:
        self._engine, self._learner, self._directory = stack.engine, learner, directory
        self.capabilities, self.score = stack.engine.capabilities, stack.engine.score

    async def load_weights(self, source: WeightSource, version: int) -> None:
        del source
        path = self._directory / "checkpoint"
        self._learner.export(path)
        client = self._engine.host.client
        await client.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        assert await client.reset_prefix_cache()
        await client.set_weight_version(str(version))


def test_the_check_names_what_the_stock_reload_leaves_stale(stack: Stack, tmp_path: Path) -> None:
    """Last of all: it leaves Qwen3-MoE's experts beyond what vLLM itself can mend."""
    learner = stack.learner(7)
    stack.push(stack.learner(8), 90)
    reload = StockReload(stack, learner, tmp_path)
    check = WeightCheck(SEQUENCES, dtype=stack.dtype, may_perturb=True)

    async def push() -> None:
        await publish_async(learner, reload, 91, transport="file")

    async def pushed_and_checked() -> dict[str, float]:
        await push()
        return await check.run(learner, reload, push)

    with pytest.raises(StaleWeightsError) as caught:
        asyncio.run(pushed_and_checked())
    print(stack.preset, stack.dtype, caught.value.gap, caught.value.groups)
    assert set(caught.value.groups) == STALE_BY_RELOAD[stack.preset]
    stack.push(learner, 92)  # Keel's own path mends it
    assert stack.gap(learner).median <= stack.tolerance


def test_the_stock_reload_of_a_dense_model_with_a_head_of_its_own_is_right(
    one_engine: OneEngine, vllm_python: str, vllm_model: Callable[..., str], tmp_path: Path
) -> None:
    """The one of these models that vLLM's own reload brings whole, so the check names nothing."""
    one_engine.close()
    path = vllm_model("qwen3", tie_word_embeddings=False)
    engines = OneEngine(vllm_python, lambda _: path, tmp_path)
    stack = Stack("qwen3", "float32", path, engines("qwen3"))
    try:
        learner = stack.learner(7)
        assert "lm_head.weight" in learner.weight_names()
        assert stack.gap(learner).median > 3 * stack.tolerance
        asyncio.run(publish_async(learner, StockReload(stack, learner, tmp_path), 1, transport="file"))
        show(stack, "untied, after the stock reload", {"gap": (stack.gap(learner).median, stack.gap(learner).max)})
        assert stack.gap(learner).median <= stack.tolerance
    finally:
        engines.close()
