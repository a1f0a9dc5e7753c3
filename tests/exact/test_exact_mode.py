"""`numerics = "exact"`: a token's bits depend on its own past alone, so engine and learner agree to the last one."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.batch import pack
from keel.config import EngineConfig, TrainConfig
from keel.engines.base import GenerateRequest
from keel.engines.embedded import EmbeddedEngine
from keel.loop import train
from keel.models.exact import ExactNumericsError
from keel.models.policy import PolicyModel
from keel.ops.attention import sink_attention
from keel.ops.attention.exact import KEY_BLOCK, attend_tiles, exact_attention, tile_positions, wider
from keel.ops.experts import ExpertsLayout, ExpertsWeights, experts_forward
from keel.ops.experts_exact import experts_exact
from keel.ops.low_rank import LowRank, low_rank
from keel.ops.matmul import linear
from keel.ops.numerics import exact_numerics, silu, whole_tiles
from keel.runs import load_run
from keel.types import Group, SamplingSettings, Segment, Task, TokenSpan, Trajectory, Turn

PRESETS = {
    "gpt_oss": {"num_hidden_layers": 2},
    "qwen3": {"num_hidden_layers": 2},
    "qwen3_moe": {"num_hidden_layers": 2, "mlp_only_layers": []},
}
SETTINGS = (
    SamplingSettings(temperature=0.7),
    SamplingSettings(temperature=1.0),
    SamplingSettings(temperature=1.3),
)
cuts = st.lists(st.integers(1, 299), max_size=6, unique=True).map(sorted)


def in_parts(rows: torch.Tensor, cuts: list[int]) -> list[torch.Tensor]:
    bounds = [0, *cuts, rows.shape[0]]
    return [rows[start:stop] for start, stop in pairwise(bounds)]


# ---- operators, one by one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "columns"), [(75, 8), (128, 700), (2880, 96)])
@settings(max_examples=15)
@given(cuts=cuts, seed=st.integers(0, 99))
def test_a_linear_row_is_the_same_in_any_company(cuts, seed, width, columns, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, width, generator=generator).to(dtype)
    weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((columns, width), (columns,)))
    down, up = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((5, width), (5, columns)))
    order = torch.randperm(300, generator=generator)
    with exact_numerics():
        whole = linear(x, weight, bias)
        assert torch.equal(torch.cat([linear(part, weight, bias) for part in in_parts(x, cuts)]), whole)
        assert torch.equal(linear(x[order], weight, bias), whole[order])
        factors = LowRank(down, up, 0.5)
        added = low_rank(x, factors)
        assert torch.equal(torch.cat([low_rank(part, factors) for part in in_parts(x, cuts)]), added)
    torch.testing.assert_close(whole, torch.nn.functional.linear(x, weight, bias), atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_silu_does_not_know_where_a_number_lies(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = torch.randn(whole_tiles(1000), 208)
        whole = silu(x)
        for start in range(0, x.shape[0], 192):
            assert torch.equal(silu(x[start : start + 64]), whole[start : start + 64])
        order = torch.randperm(x.shape[0])
        assert torch.equal(silu(x[order]), whole[order])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("interleaved", [True, False])
@settings(max_examples=10)
@given(cuts=cuts, seed=st.integers(0, 99))
def test_an_expert_does_not_see_who_else_chose_it(cuts, seed, interleaved):
    generator = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(*shape, generator=generator)

    layout = ExpertsLayout(transposed=interleaved, interleaved=interleaved, alpha=1.702, offset=1.0, limit=7.0)
    first, second = (6, 40, 96), (6, 48, 40)
    if not interleaved:
        first, second = (6, 96, 40), (6, 40, 48)
    experts = ExpertsWeights(some(*first), some(6, 96), some(*second), some(6, 40))
    hidden, weights = some(300, 40), torch.softmax(some(300, 2), -1)
    chosen = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(300)])
    whole = experts_exact(hidden, chosen, weights, experts, layout)
    parts = zip(*(in_parts(each, cuts) for each in (hidden, chosen, weights)), strict=True)
    assert torch.equal(torch.cat([experts_exact(*part, experts, layout) for part in parts]), whole)
    torch.testing.assert_close(whole, experts_forward(hidden, chosen, weights, experts, layout), atol=2e-4, rtol=1e-4)


def from_a_cache(q, k, v, sinks, window, positions):
    """The rows at `positions` of one sequence, each alone, its keys in a cache with other things beside and behind."""
    places = tile_positions(q.shape[1] // k.shape[1])
    blocks = -(-(k.shape[0] + 70) // KEY_BLOCK)
    keys, values = (torch.randn(k.shape[1], blocks * KEY_BLOCK, k.shape[2]) for _ in range(2))
    keys[:, : k.shape[0]], values[:, : k.shape[0]] = k.transpose(0, 1), v.transpose(0, 1)
    query = q.new_zeros(len(positions), places, *q.shape[1:])
    at = torch.full((len(positions), places), -1)
    for row, position in enumerate(positions):
        query[row, position % places], at[row, position % places] = q[position], position

    def key_block(block, some):
        columns = slice(block * KEY_BLOCK, (block + 1) * KEY_BLOCK)
        count = some.stop - some.start
        return keys[:, columns].repeat(count, 1, 1), values[:, columns].repeat(count, 1, 1)

    out, _ = attend_tiles(query, at, key_block, kv_heads=k.shape[1], sinks=sinks, scale=0.2, window=window)
    return torch.stack([out[row, position % places] for row, position in enumerate(positions)])


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 32), (8, 2, 16), (3, 3, 64), (16, 2, 64)])
@pytest.mark.parametrize("window", [None, 32])
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_attention_is_the_same_packed_alone_and_from_a_cache(lengths, seed, heads, kv_heads, size, window):
    torch.manual_seed(seed)
    total = sum(lengths)
    q, k, v = torch.randn(total, heads, size), torch.randn(total, kv_heads, size), torch.randn(total, kv_heads, size)
    sinks = torch.randn(heads)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    whole = exact_attention(q, k, v, sinks, cu_seqlens=bounds, scale=0.2, window=window)
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        own = [each[start:stop] for each in (q, k, v)]
        alone = exact_attention(*own, sinks, cu_seqlens=torch.tensor([0, stop - start]), scale=0.2, window=window)
        assert torch.equal(alone, whole[start:stop])
        positions = sorted({0, (stop - start) // 2, stop - start - 1})
        assert torch.equal(from_a_cache(*own, sinks, window, positions), whole[start:stop][positions])
    plain = sink_attention(q, k, v, sinks, cu_seqlens=bounds, max_seqlen=max(lengths), scale=0.2, window=window)
    torch.testing.assert_close(whole, plain, atol=1e-5, rtol=1e-5)


def test_attention_has_the_gradient_of_the_dense_twin():
    torch.manual_seed(0)
    bounds = torch.tensor([0, 90, 131])
    given = [torch.randn(131, *shape, dtype=torch.float64) for shape in ((6, 32), (2, 32), (2, 32))]
    given.append(torch.randn(6, dtype=torch.float64))
    weight = torch.randn(131, 6, 32, dtype=torch.float64)

    def gradients(attention, **options):
        leaves = [each.clone().requires_grad_() for each in given]
        out = attention(*leaves, cu_seqlens=bounds, scale=0.2, window=40, **options)
        return out, torch.autograd.grad((out * weight).sum(), leaves)

    out, found = gradients(exact_attention)
    dense, wanted = gradients(sink_attention, max_seqlen=90, backend="reference")
    torch.testing.assert_close(out, dense, atol=1e-12, rtol=1e-12)
    for own, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, right, atol=1e-11, rtol=1e-11)


def test_higher_tiles_are_measured_before_they_are_used():
    assert wider(32, torch.float32, torch.get_num_threads()) in (1, 8)


# ---- engine against learner


def drawn_groups(engine: EmbeddedEngine, count: int, vocab_size: int) -> list[Group]:
    """Episodes of three turns: prompts begun alike (shared), kept in their slots (reused), past the sliding window."""
    shared = [random.Random(7).randrange(vocab_size) for _ in range(70)]

    async def episode(number: int) -> Group:
        draw = random.Random(number)
        sampling = SETTINGS[number % len(SETTINGS)]
        prompt = shared[: draw.randrange(20, 70)] if number % 3 else []
        context = [*prompt, *(draw.randrange(vocab_size) for _ in range(draw.randrange(2, 30)))]
        spans: list[TokenSpan] = []
        for turn in range(3):
            spans.append(TokenSpan(tuple(context), "context"))
            known = tuple(token for span in spans for token in span.token_ids)
            result = await engine.generate(
                GenerateRequest(f"{number} {turn}", f"{number}", known, sampling, draw.randrange(1, 30), (), number)
            )
            (span,) = result.spans
            spans.append(TokenSpan(span.token_ids, "policy", span.logprobs, 0, sampling))
            context = [draw.randrange(vocab_size) for _ in range(draw.randrange(1, 9))]
        await engine.end_session(f"{number}")
        turns = tuple(Turn((), "", "length", 0, place) for place in (1, 3, 5))
        task = Task(f"{number}")
        attempt = Trajectory(task, f"{number}", 0, (), turns, (Segment(tuple(spans)),), "completed")
        return Group(f"{number}", task, (dataclasses.replace(attempt, reward=1.0),))

    async def everybody() -> list[Group]:
        return list(await asyncio.gather(*map(episode, range(count))))

    return asyncio.run(everybody())


def gaps(policy: PolicyModel, groups: list[Group], max_tokens: int) -> torch.Tensor:
    """Of every drawn token, how far the learner is from the engine."""
    found = []
    for micro_batch in pack(groups, max_tokens=max_tokens).micro_batches:
        logprobs = policy(micro_batch).logprobs.detach()
        assert micro_batch.rollout_logprobs is not None
        found.append((logprobs - micro_batch.rollout_logprobs)[micro_batch.loss_mask].abs())
    return torch.cat(found)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_learner_has_the_engines_bits_however_it_packs(tiny_checkpoint, preset, dtype):
    path = tiny_checkpoint(preset, **PRESETS[preset])
    policy = PolicyModel.load(path, dtype=dtype, numerics="exact")
    engine = EmbeddedEngine(policy, EngineConfig(slots=9, prefill_tile=64), max_sequence_tokens=224)
    groups = drawn_groups(engine, 14, policy.info.vocab_size)
    assert engine.statistics()["shared_tokens"] > 100
    for max_tokens in (1, 500, 100_000):
        found = gaps(policy, groups, max_tokens)
        assert len(found) > 400
        assert float(found.max()) == 0.0
    if dtype == "float32":
        fast = PolicyModel.load(path)
        assert float(gaps(fast, groups, 500).max()) > 0.0  # so the zeros above say something


def test_checkpointing_recomputes_in_exact_mode_and_gradients_are_those_of_fast_mode(tiny_checkpoint, make_groups):
    path = tiny_checkpoint("gpt_oss", **PRESETS["gpt_oss"])
    (micro_batch,) = pack(make_groups(2, 2), max_tokens=10_000).micro_batches
    found = {}
    for numerics, checkpointing in (("fast", False), ("exact", False), ("exact", True)):
        policy = PolicyModel.load(path, numerics=numerics, gradient_checkpointing=checkpointing)
        outputs = policy(micro_batch)
        outputs.logprobs.sum().backward()
        found[numerics, checkpointing] = (
            outputs.logprobs.detach(),
            {name: parameter.grad for name, parameter in policy.trained_parameters().items()},
        )
    assert torch.equal(found["exact", False][0], found["exact", True][0])
    for name, gradient in found["exact", False][1].items():
        assert torch.equal(gradient, found["exact", True][1][name])
        torch.testing.assert_close(gradient, found["fast", False][1][name], atol=2e-4, rtol=1e-3)


# ---- whole runs


@pytest.mark.parametrize("sections", [{}, {"engine": {"process": "separate"}}], ids=["shared", "own copy"])
def test_no_step_of_a_run_has_a_gap(tmp_path, make_config, warm_weights, sections):
    before = torch.are_deterministic_algorithms_enabled()
    config = make_config(
        tmp_path / "run",
        numerics="exact",
        steps=3,
        num_threads=1,
        model={"path": warm_weights("gpt_oss")},
        warm_start={"steps": 0},
        optim={"lr": 1e-3},
        **sections,
    )
    train(config)
    rows = load_run(tmp_path / "run").rows_of("step")
    assert len(rows) == 3
    assert sum(row["policy/loss_tokens"] for row in rows) > 300
    for row in rows:
        for name in ("mismatch/abs_max", "mismatch/route_diff", "policy/ratio_max_dev", "policy/recompute_max_dev"):
            assert row[name] == 0.0, name
    assert torch.are_deterministic_algorithms_enabled() == before


# ---- what is refused


@pytest.mark.parametrize(
    ("sections", "word"),
    [
        ({"engine": {"id": "vllm"}}, "CPU build has no such mode"),
        ({"engine": {"id": "other:Engine"}}, "another engine has its own"),
        ({"learner": {"ranks": 2}}, "ranks"),
        ({"device": "cuda"}, "measured on the CPU only"),
        ({"model": {"path": "x", "experts": "grouped_mm"}}, "experts"),
        ({"model": {"path": "x", "attention": "sdpa"}}, "attention"),
    ],
)
def test_what_it_cannot_hold_for_is_refused(sections, word):
    TrainConfig(**sections)
    with pytest.raises(ValueError, match=word):
        TrainConfig(numerics="exact", **sections)


def test_a_library_whose_rows_see_each_other_is_refused(tiny_checkpoint, monkeypatch):
    from keel.ops import matmul

    def by_place(left, right, *, rows, bias=None):
        made = left @ right if bias is None else torch.addmm(bias, left, right)
        return made + torch.arange(len(made))[:, None] * 1e-7

    monkeypatch.setattr(matmul, "product", by_place)
    with pytest.raises(ExactNumericsError, match="other bits beside other rows"):
        PolicyModel.load(tiny_checkpoint("qwen3", **PRESETS["qwen3"]), numerics="exact")


def test_a_rotation_that_depends_on_the_length_is_refused(tiny_checkpoint):
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    path = tiny_checkpoint("qwen3", **PRESETS["qwen3"], rope_parameters=rope)
    with pytest.raises(ExactNumericsError, match="dynamic"):
        PolicyModel.load(path, numerics="exact")
