"""Temperature, top-k and top-p are the learner's too: over what the engine left, to rounding; otherwise refused."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import pytest
import torch

from benchmarks.routing_replay import flipping_engine, sample_groups
from keel.algo.advantage import group_mean
from keel.algo.apply import add_advantages
from keel.batch import pack
from keel.config import AlgoConfig, KLConfig, LearnerConfig, ModelConfig, OptimConfig, Stage
from keel.learner.base import LearnerError
from keel.learner.learner import Learner
from keel.records import step_streams
from keel.rollouts.store import read_trajectories, write_step_record, write_trajectories
from keel.step_record import load_record
from keel.types import SamplingSettings, Support, Verdict

SAMPLING = SamplingSettings(temperature=0.7, top_p=0.9, top_k=20)
SMALL = {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def drawn(tiny_checkpoint):
    """`drawn(preset, sampling)`: path, and groups drawn by an engine with weights of its own."""
    made = {}

    def draw(preset="gpt_oss", sampling=SAMPLING):
        if (preset, sampling) not in made:
            path = tiny_checkpoint(preset, **SMALL)
            with ExitStack() as stack:
                engine = flipping_engine(path, "float32", 0.0, stack)
                groups = sample_groups(engine, sampling, num_groups=3, num_new=16, return_support=True)
            made[preset, sampling] = path, groups
        return made[preset, sampling]

    return draw


def packed(groups, max_tokens=400, num_updates=1):
    return add_advantages(pack(groups, max_tokens=max_tokens, num_updates=num_updates), group_mean, {})


def learner_of(path, algo=None, **learner):
    made = Learner(ModelConfig(path=path), LearnerConfig(**learner))
    made.enter(Stage("reinforcement", 0, 8, algo or AlgoConfig(), OptimConfig(lr=1e-2)))
    return made


def changed(groups, change):
    """The groups with `change(span)` in the place of every drawn span."""

    def of(trajectory):
        segments = [
            dataclasses.replace(s, spans=tuple(change(x) if x.origin == "policy" else x for x in s.spans))
            for s in trajectory.segments
        ]
        return dataclasses.replace(trajectory, segments=tuple(segments))

    return [dataclasses.replace(group, trajectories=tuple(map(of, group.trajectories))) for group in groups]


def without_support(groups):
    return changed(groups, lambda span: dataclasses.replace(span, support=None))


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3", "qwen3_moe"])
def test_engine_and_learner_agree_to_1e_6(drawn, preset):
    path, groups = drawn(preset)
    update = learner_of(path).backward(packed(groups))
    assert update.metrics["mismatch/abs_max"] < 1e-6
    assert update.metrics["policy/ratio_max_dev"] == update.metrics["policy/recompute_max_dev"] == 0.0
    assert 1.0 < update.metrics["support/mean_size"] <= 20.0
    assert update.metrics["support/missing_share"] == 0.0
    assert update.metrics["support/own_diff"] < 0.01
    assert 0.0 < update.metrics["policy/entropy"] < torch.tensor(20.0).log()


def test_without_the_cut_the_gap_would_be_large(drawn):
    path, groups = drawn()
    uncut = changed(
        groups, lambda span: dataclasses.replace(span, sampling=SamplingSettings(temperature=0.7), support=None)
    )
    assert learner_of(path).backward(packed(uncut)).metrics["mismatch/abs_mean"] > 0.1


@pytest.mark.parametrize("sampling", [SamplingSettings(1.3, 0.5, 0), SamplingSettings(0.5, 1.0, 3)])
def test_each_limit_alone(drawn, sampling):
    path, groups = drawn("qwen3", sampling)
    assert learner_of(path).backward(packed(groups)).metrics["mismatch/abs_max"] < 1e-6


def test_the_reference_is_over_the_same_support(drawn):
    path, groups = drawn()
    learner = learner_of(path, AlgoConfig(kl=KLConfig(coefficient=0.1), entropy_coefficient=0.01))
    update = learner.backward(learner.score(packed(groups)))
    assert update.metrics["policy/kl"] == 0.0
    assert update.finite
    learner.apply(update, Verdict())
    assert learner.backward(learner.score(packed(groups))).metrics["policy/kl"] > 0.0


def test_the_support_stays_while_weights_move(drawn):
    """Of several updates the later ones are over the same tokens: ratios are those of one distribution."""
    path, groups = drawn()
    learner = learner_of(path, AlgoConfig(updates_per_batch=2))
    batch = learner.score(packed(groups, num_updates=2))
    for index in range(2):
        update = learner.backward(batch, index)
        assert update.finite
        learner.apply(update, Verdict())
    assert update.metrics["policy/ratio_max_dev"] > 0.0


def test_a_cut_nobody_told_is_refused_or_made_again_with_the_drawn_token_inside(drawn):
    path, groups = drawn()
    batch = packed(without_support(groups))
    refusing = learner_of(path)
    with pytest.raises(LearnerError, match="did not say what was left"):
        refusing.score(batch)
    with pytest.raises(LearnerError, match="did not say what was left"):
        refusing.backward(batch)
    cutting = learner_of(path, missing_support="own_cut")
    scored = cutting.score(batch)
    update = cutting.backward(scored)
    assert update.metrics["support/missing_share"] == 1.0
    assert update.metrics["mismatch/abs_mean"] < 1e-6
    assert update.metrics["policy/ratio_max_dev"] == 0.0
    told = packed(groups)
    for ours, theirs in zip(scored.micro_batches, told.micro_batches, strict=True):
        bounds, wanted = ours.support_offsets.tolist(), theirs.support_offsets.tolist()
        differing = 0
        for row in range(ours.num_tokens):
            mine = set(ours.support_ids[bounds[row] : bounds[row + 1]].tolist())
            assert not ours.loss_mask[row] or int(ours.labels[row]) in mine
            differing += mine != set(theirs.support_ids[wanted[row] : wanted[row + 1]].tolist())
        assert differing <= 1
    # A policy that has moved would leave other tokens; the drawn one is among them all the same.
    with torch.no_grad():
        cutting.policy.head.weight.add_(0.3 * torch.randn_like(cutting.policy.head.weight))
    moved = cutting.backward(cutting.score(batch))
    assert moved.finite
    assert moved.metrics["mismatch/abs_mean"] > 1e-3


def test_the_learner_counts_where_it_would_have_cut_otherwise(drawn):
    path, groups = drawn()
    learner = learner_of(path)
    with torch.no_grad():
        learner.policy.head.weight.add_(0.1 * torch.randn_like(learner.policy.head.weight))
    assert 0.05 < learner.backward(packed(groups)).metrics["support/own_diff"] <= 1.0


def test_a_drawn_token_outside_its_support_is_refused(drawn):
    _, groups = drawn()

    def wrong(span):
        return dataclasses.replace(span, token_ids=tuple((t + 1) % 320 for t in span.token_ids))

    with pytest.raises(ValueError, match="is not among the"):
        pack(changed(groups, wrong), max_tokens=400)


def test_some_tokens_told_and_some_not(drawn):
    """A span of an engine that told beside one that did not, and a count of 0 where nothing was cut."""
    path, groups = drawn()

    def forget(span):
        if span.token_ids[0] % 2:
            return dataclasses.replace(span, support=None)
        return span

    batch = packed(changed(groups, forget))
    update = (learner := learner_of(path, missing_support="own_cut")).backward(learner.score(batch))
    assert 0.0 < update.metrics["support/missing_share"] < 1.0
    assert update.metrics["mismatch/abs_mean"] < 1e-6
    uncut = changed(groups, lambda span: dataclasses.replace(span, support=Support((0,) * len(span), b"")))
    assert learner_of(path).backward(packed(uncut)).metrics["mismatch/abs_mean"] > 0.1


def test_records_keep_what_was_left(drawn, tmp_path):
    path, groups = drawn()
    batch = packed(groups, max_tokens=100)
    assert len(batch.micro_batches) > 2
    update = learner_of(path).backward(batch)
    write_step_record(tmp_path / "record.safetensors", step_streams(batch, [update]), {"step": 0})
    record = load_record(tmp_path / "record.safetensors")
    spans = [span for group in groups for t in group.kept for s in t.segments for span in s.spans]
    counts = [count for span in spans for count in (span.support.counts if span.support else [0] * len(span))]
    rows = [len(record.support(row)) for row in range(record.num_tokens)]
    firsts = {0, *torch.tensor([len(s) for g in groups for t in g.kept for s in t.segments]).cumsum(0).tolist()}
    assert rows == [count for place, count in enumerate(counts) if place not in firsts]
    assert all(record.streams["labels"][row] in record.support(row) for row in range(record.num_tokens) if rows[row])
    assert set(record.streams["top_k"].tolist()) == {0, 20}
    attempts = [trajectory for group in groups for trajectory in group.trajectories]
    write_trajectories(tmp_path / "t.jsonl", attempts, with_tokens=True)
    assert [t.segments for t in read_trajectories(tmp_path / "t.jsonl")] == [t.segments for t in attempts]
