"""Routing replay: an engine that sends tokens elsewhere is followed to rounding, in every pass of the learner."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import pytest
import torch

from benchmarks.routing_replay import figures, flipping_engine, sample_groups
from keel.algo.advantage import group_mean
from keel.algo.apply import add_advantages
from keel.batch import pack
from keel.config import (
    AlgoConfig,
    KLConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RouterConfig,
    Stage,
)
from keel.learner.base import LearnerError
from keel.learner.group import LearnerGroup
from keel.learner.learner import Learner
from keel.learner.replay import lacks_support
from keel.models.router import replayed
from keel.types import SamplingSettings, Segment, Verdict

SMALL = {"gpt_oss": {"num_hidden_layers": 2}, "qwen3_moe": {"num_hidden_layers": 2, "mlp_only_layers": []}}
KL = AlgoConfig(kl=KLConfig(coefficient=0.1))


def stage(algo):
    return Stage("reinforcement", 0, 8, algo, OptimConfig(lr=1e-3))


@pytest.fixture(scope="module")
def drawn(tiny_checkpoint):
    """`drawn(preset)`: path, and groups of an engine that sends about a tenth of each layer's tokens elsewhere."""
    made = {}

    def draw(preset="gpt_oss"):
        if preset not in made:
            path = tiny_checkpoint(preset, **SMALL[preset])
            with ExitStack() as stack:
                engine = flipping_engine(path, "float32", 0.1, stack)
                made[preset] = path, sample_groups(engine, SamplingSettings(temperature=0.9), num_groups=3, num_new=16)
        return made[preset]

    return draw


def packed(groups, max_tokens=400, num_updates=1):
    return add_advantages(pack(groups, max_tokens=max_tokens, num_updates=num_updates), group_mean, {})


def learner_of(path, algo=None, learner=None, **model):
    made = Learner(ModelConfig(path=path, **model), learner or LearnerConfig())
    made.enter(stage(algo or AlgoConfig()))
    return made


def without_routes(batch, rows=slice(None)):
    """The batch with the engine's choices unknown for some rows of every micro-batch."""

    def forgotten(m):
        routes = m.routed_experts.clone()
        routes[rows] = -1
        return dataclasses.replace(m, routed_experts=routes)

    return batch.with_micro_batches(map(forgotten, batch.micro_batches))


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3_moe"])
def test_under_injected_flips_the_gap_is_at_the_dense_level(tiny_checkpoint, preset):
    """Before and after, of an engine that sends about a tenth of each layer's tokens elsewhere."""
    found = figures(tiny_checkpoint(preset, **SMALL[preset]), "float32", 0.1)
    dense = figures(tiny_checkpoint("qwen3", num_hidden_layers=2), "float32", 0.0, ("off",))["off"]
    before, after = found["off"], found["auto"]
    assert before["mismatch/route_disagreement"] == before["mismatch/route_diff"] > 0.05
    assert before["mismatch/abs_mean"] > 1e-2
    assert before["routes/replayed_share"] == 0.0
    assert after["mismatch/route_disagreement"] == 0.0
    assert after["mismatch/route_diff"] > 0.05, "what the learner would choose itself is still known"
    assert after["mismatch/abs_max"] < 3 * dense["mismatch/abs_max"] < 5e-6
    assert after["mismatch/outliers"] == 0.0
    assert (after["routes/replayed_share"], after["routes/missing_share"]) == (1.0, 0.0)
    assert after["policy/ratio_max_dev"] == after["policy/recompute_max_dev"] == 0.0


def test_checkpointing_and_micro_batches_replay_the_same(drawn):
    path, groups = drawn()
    plain = learner_of(path).backward(packed(groups))
    with_checkpoints = learner_of(path, gradient_checkpointing=True).backward(packed(groups))
    assert with_checkpoints.grad_norm == plain.grad_norm
    assert with_checkpoints.metrics["policy/recompute_max_dev"] == 0.0
    many = learner_of(path, gradient_checkpointing=True).backward(packed(groups, max_tokens=80))
    assert many.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)
    assert many.metrics["mismatch/route_disagreement"] == 0.0
    assert many.metrics["mismatch/abs_max"] < 5e-6


def test_the_reference_replays_too(drawn):
    """While weights are equal the KL is 0 to the bit, whatever experts the engine chose."""
    path, groups = drawn()
    learner = learner_of(path, KL)
    batch = learner.score(packed(groups))
    update = learner.backward(batch)
    assert update.metrics["policy/kl"] == 0.0
    for index, m in enumerate(batch.micro_batches):
        assert torch.equal(m.ref_logprobs, update.streams[index]["logprobs"])


def test_an_adapter_and_its_reference_replay(drawn):
    path, groups = drawn()
    learner = learner_of(path, KL, lora=LoraConfig(rank=2))
    update = learner.backward(learner.score(packed(groups)))
    assert update.metrics["policy/kl"] == update.metrics["mismatch/route_disagreement"] == 0.0
    assert update.metrics["mismatch/abs_max"] < 5e-6
    assert update.grad_norm > 0.0


def test_missing_routes_fall_back_token_by_token_and_are_counted(drawn):
    """Packed sequences: the others stay exactly replayed, the ratio exactly 1."""
    path, groups = drawn()
    batch = packed(groups)
    rows = sum(m.num_tokens for m in batch.micro_batches)
    forgotten = sum(len(range(0, m.num_tokens, 5)) for m in batch.micro_batches)
    update = learner_of(path).backward(without_routes(batch, slice(None, None, 5)))
    assert update.metrics["routes/missing_share"] == pytest.approx(forgotten / rows)
    assert update.metrics["routes/replayed_share"] == pytest.approx(1 - forgotten / rows)
    assert update.metrics["mismatch/route_disagreement"] == 0.0, "of those the engine told"
    assert update.metrics["policy/ratio_max_dev"] == update.metrics["policy/recompute_max_dev"] == 0.0
    assert update.metrics["mismatch/abs_max"] > 1e-3, "what is not known cannot be followed"


def test_of_several_updates_the_score_pass_chooses_what_is_missing_for_all(drawn):
    path, groups = drawn()
    algo = AlgoConfig(updates_per_batch=2)
    learner = learner_of(path, algo)
    batch = learner.score(without_routes(packed(groups, num_updates=2)))
    first = learner.backward(batch, 0)
    assert first.metrics["policy/ratio_max_dev"] == 0.0
    assert (first.metrics["routes/replayed_share"], first.metrics["routes/missing_share"]) == (1.0, 1.0)
    learner.apply(first, Verdict())
    with torch.no_grad():  # routers that now choose otherwise: the second update still runs the score pass's experts
        for router in learner.policy.routers:
            router.weight.copy_(torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(0)))
    replayed_routes = batch.micro_batches[batch.update_bounds[1]].replayed_routes
    again = learner.acting(batch.micro_batches[batch.update_bounds[1]], with_routes=True)
    assert torch.equal(again.routes, replayed_routes)
    assert not torch.equal(again.own_routes, replayed_routes)


def test_two_ranks_do_what_one_process_does(drawn):
    """With routes that are missing, a cut that nobody told and the load-balancing loss, which all take passes of their
    own; seven micro-batches on two ranks, so that one idles once, and must not count."""
    path, groups = drawn()
    first, *others = groups
    cut = SamplingSettings(temperature=0.9, top_k=30)

    def as_if_cut(trajectory):
        (segment,) = trajectory.segments
        spans = [span if span.sampling is None else dataclasses.replace(span, sampling=cut) for span in segment.spans]
        return dataclasses.replace(trajectory, segments=(Segment(tuple(spans)),))

    groups = [
        dataclasses.replace(group, trajectories=tuple(map(as_if_cut, group.trajectories)))
        for group in (dataclasses.replace(first, trajectories=first.trajectories[1:]), *others)
    ]
    model = ModelConfig(path=path, router=RouterConfig(aux_loss_coefficient=0.5))
    updates = []
    with LearnerGroup(model, LearnerConfig(ranks=2, missing_support="own_cut")) as two:
        for learner in (Learner(model, LearnerConfig(missing_support="own_cut")), two):
            learner.enter(stage(AlgoConfig(updates_per_batch=2)))
            batch = without_routes(packed(groups, max_tokens=1, num_updates=2), slice(None, None, 7))
            assert len(batch.update(0)) == 7
            scored = learner.score(batch)
            assert all(m.replayed_routes is not None and not lacks_support(m) for m in scored.micro_batches)
            updates.append(learner.backward(scored, 0))
    one, two_ranks = updates
    assert two_ranks.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    shares = ("routes/replayed_share", "routes/missing_share", "mismatch/route_diff", "support/missing_share")
    loads = ("router/aux_loss", "router/load_max_ratio", "router/load_entropy", "router/dead_experts")
    for name in (*shares, *loads, "support/mean_size"):
        assert two_ranks.metrics[name] == pytest.approx(one.metrics[name], rel=1e-5), name
    assert two_ranks.metrics["policy/ratio_max_dev"] == 0.0


def test_replay_can_be_demanded_or_left_out(drawn, tiny_checkpoint):
    path, groups = drawn()
    batch = packed(groups)
    none = batch.with_micro_batches(dataclasses.replace(m, routed_experts=None) for m in batch.micro_batches)
    on = LearnerConfig(replay_routes="on")
    with pytest.raises(LearnerError, match="returned no expert choices"):
        learner_of(path, learner=on).backward(none)
    assert "routes/missing_share" in learner_of(path).backward(none).metrics
    assert learner_of(path, learner=on).backward(batch).metrics["mismatch/route_disagreement"] == 0.0
    with pytest.raises(LearnerError, match="0 layers of experts"):
        Learner(ModelConfig(path=tiny_checkpoint("qwen3", num_hidden_layers=2)), on)
    off = learner_of(path, learner=LearnerConfig(replay_routes="off")).backward(batch)
    assert off.metrics["mismatch/route_disagreement"] > 0.0


def test_routes_of_another_model_are_refused(drawn):
    path, groups = drawn()
    batch = packed(groups)
    m = batch.micro_batches[0]
    for routes in (m.routed_experts + 100, m.routed_experts[:, :1]):
        wrong = batch.with_micro_batches([dataclasses.replace(m, routed_experts=routes), *batch.micro_batches[1:]])
        with pytest.raises(ValueError, match="must run the same model"):
            learner_of(path).backward(wrong)


def test_nothing_is_replayed_outside_the_learners_passes(drawn):
    path, groups = drawn()
    learner = learner_of(path)
    learner.backward(packed(groups))
    assert replayed() is None
