"""What a learner does with verdicts, broken gradients, empty batches and calls out of order."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from keel.algo.advantage import group_mean
from keel.algo.apply import add_advantages
from keel.batch import pack
from keel.config import AlgoConfig, KLConfig, LearnerConfig, ModelConfig, OptimConfig, Plugin, Stage, TrainConfig
from keel.learner.base import LearnerError
from keel.learner.learner import Learner
from keel.plugins import PluginError
from keel.types import Routes, Segment, Verdict

STAGE = Stage("reinforcement", 0, 5, AlgoConfig(), OptimConfig(lr=1e-2, schedule="linear"))


@pytest.fixture
def learner(tiny_checkpoint):
    made = Learner(ModelConfig(path=tiny_checkpoint("gpt_oss", num_hidden_layers=2)), LearnerConfig())
    made.enter(STAGE)
    return made


@pytest.fixture
def batch(make_groups):
    return add_advantages(pack(make_groups(2, 3), max_tokens=90), group_mean, {})


def snapshot(learner):
    tensors = [parameter.detach().clone() for parameter in learner.parameters().values()]
    return tensors + [t.clone() for kind in learner.optimizer.moments().values() for t in kind.values()]


def unchanged(learner, before):
    now = snapshot(learner)
    return len(now) == len(before) and all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


def poisoned(batch):
    first, *others = batch.micro_batches
    advantages = first.advantages.clone()
    advantages[int(first.loss_mask.nonzero()[0])] = math.nan
    return batch.with_micro_batches([dataclasses.replace(first, advantages=advantages), *others])


def test_a_non_finite_gradient_changes_no_bit(learner, batch):
    learner.apply(learner.backward(batch), Verdict())
    before = snapshot(learner)
    update = learner.backward(poisoned(batch))
    assert not update.finite
    stats = learner.apply(update, Verdict("go"))
    assert stats["policy/skipped"] == 1.0
    assert stats["policy/num_skipped"] == 1.0
    assert unchanged(learner, before)
    assert (learner.step, learner.version) == (2, 1)
    after = learner.apply(learner.backward(batch), Verdict())
    assert after["policy/skipped"] == 0.0
    assert after["policy/num_skipped"] == 1.0
    assert not unchanged(learner, before)


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_a_verdict_against_it_changes_no_bit(learner, batch, action):
    learner.apply(learner.backward(batch), Verdict())
    before = snapshot(learner)
    update = learner.backward(batch)
    assert update.finite
    assert learner.apply(update, Verdict(action, "seen"))["policy/skipped"] == 1.0
    assert unchanged(learner, before)
    assert (learner.step, learner.version) == (2, 1)


def test_the_step_taken_is_clipped_and_scheduled(learner, batch):
    rates = []
    for _ in range(5):
        update = learner.backward(batch)
        stats = learner.apply(update, Verdict())
        rates.append(stats["policy/lr"])
        assert stats["policy/clip_factor"] == pytest.approx(min(1.0, 1.0 / update.grad_norm), rel=1e-5)
    assert rates == pytest.approx([1e-2 * (1 - i / 4) for i in range(5)])


def test_an_empty_batch_is_an_outcome(learner):
    before = snapshot(learner)
    empty = add_advantages(learner.score(pack([], max_tokens=9)), group_mean, {})
    update = learner.backward(empty)
    assert (update.loss, update.grad_norm, update.finite, update.num_loss_tokens) == (0.0, 0.0, True, 0)
    assert update.last
    for name in ("ratio_max_dev", "recompute_max_dev", "clip_fraction", "entropy", "grad_norm", "loss"):
        assert update.metrics[f"policy/{name}"] == 0.0
    assert learner.apply(update, Verdict())["policy/skipped"] == 0.0
    assert unchanged(learner, before)
    assert (learner.step, learner.version) == (1, 0)


def test_out_of_order(learner, batch, tiny_checkpoint):
    update = learner.backward(batch)
    newer = learner.backward(batch)
    with pytest.raises(LearnerError, match="once, right after its backward"):
        learner.apply(update, Verdict())
    learner.apply(newer, Verdict())
    with pytest.raises(LearnerError, match="once, right after its backward"):
        learner.apply(newer, Verdict())
    outside = Learner(learner.config, LearnerConfig())
    with pytest.raises(LearnerError, match="enter"):
        outside.backward(batch)
    with pytest.raises(IndexError):
        learner.backward(batch, 1)
    with pytest.raises(LearnerError, match="in order"):
        learner.enter(dataclasses.replace(STAGE, first_step=2))


def test_missing_streams_are_told(learner, make_groups):
    plain = pack(make_groups(2, 3), max_tokens=90)
    with pytest.raises(ValueError, match="add_advantages"):
        learner.backward(plain)
    learner.enter(dataclasses.replace(STAGE, algo=AlgoConfig(updates_per_batch=2)))
    with pytest.raises(ValueError, match="old_logprobs"):
        learner.backward(add_advantages(plain, group_mean, {}))
    learner.enter(dataclasses.replace(STAGE, algo=AlgoConfig(kl=KLConfig(coefficient=0.1))))
    with pytest.raises(ValueError, match="ref_logprobs"):
        learner.backward(add_advantages(plain, group_mean, {}))
    with pytest.raises(PluginError, match="clip_lo"):
        learner.enter(dataclasses.replace(STAGE, algo=AlgoConfig(loss=Plugin(id="ppo_clip", clip_lo=0.1))))


def test_scoring_with_the_reference_puts_the_weights_back(learner, batch):
    learner.enter(dataclasses.replace(STAGE, algo=AlgoConfig(kl=KLConfig(coefficient=0.1))))
    first = learner.backward(learner.score(batch))
    assert first.metrics["policy/kl"] == 0.0
    learner.apply(first, Verdict())
    before = snapshot(learner)
    scored = learner.score(batch)
    assert unchanged(learner, before)
    assert all(m.old_logprobs is None for m in scored.micro_batches)
    assert learner.backward(scored).metrics["policy/kl"] > 0.0


def test_only_what_the_algorithm_needs_is_scored(learner, batch):
    assert learner.score(batch) is batch


def test_mismatch_against_the_learners_own_log_probs_is_zero(learner, make_groups):
    """Routes and log-probs recorded from the learner itself, as an exact engine would return them."""
    groups = make_groups(2, 3)
    plain = pack(groups, max_tokens=10_000)
    (m,) = plain.micro_batches
    with torch.no_grad():
        outputs = learner.policy(m, with_routes=True)
    perfect = dataclasses.replace(m, rollout_logprobs=outputs.logprobs, routed_experts=outputs.routes)
    update = learner.backward(add_advantages(plain.with_micro_batches([perfect]), group_mean, {}))
    for name in ("abs_mean", "abs_max", "k1", "k3", "outliers", "outlier_share", "route_diff", "outliers_routed"):
        assert update.metrics[f"mismatch/{name}"] == 0.0


def test_staleness_is_that_of_the_oldest_token(learner, make_groups, batch):
    for _ in range(2):
        learner.apply(learner.backward(batch), Verdict())
    older = add_advantages(
        pack([*make_groups(1, 2, version=2), *make_groups(1, 2, version=1)], max_tokens=90), group_mean, {}
    )
    assert learner.backward(older).metrics["policy/staleness"] == 1.0


def test_the_check_runs_when_it_is_due(tiny_checkpoint, batch):
    model = ModelConfig(path=tiny_checkpoint("gpt_oss", num_hidden_layers=2))
    for every, expected in ((2, [True, False, True]), (0, [False] * 3)):
        learner = Learner(model, LearnerConfig(recompute_every=every))
        learner.enter(STAGE)
        seen = []
        for _ in expected:
            update = learner.backward(batch)
            seen.append("policy/recompute_max_dev" in update.metrics)
            learner.apply(update, Verdict())
        assert seen == expected


def test_stages_of_a_config():
    config = TrainConfig(steps=7, warm_start={"steps": 3})
    warm, reinforce = config.stages()
    assert (warm.name, warm.first_step, warm.num_steps, warm.algo.loss.id) == ("warm_start", 0, 3, "cross_entropy")
    assert warm.optim == config.warm_start.optim
    assert (reinforce.name, reinforce.first_step, reinforce.num_steps) == ("reinforcement", 3, 7)
    assert (reinforce.algo, reinforce.optim) == (config.algo, config.optim)
    assert [stage.name for stage in TrainConfig(steps=7).stages()] == ["reinforcement"]
    assert TrainConfig(steps=0).stages() == ()


def test_routes_of_the_wrong_model_are_refused(learner, make_groups):
    (group,) = make_groups(1, 2)
    spans = tuple(
        dataclasses.replace(span, routed_experts=Routes.missing(len(span), 5, 2))
        for span in group.trajectories[0].segments[0]
    )
    odd = dataclasses.replace(group.trajectories[0], segments=(Segment(spans),))
    batch = pack([dataclasses.replace(group, trajectories=(odd,))], max_tokens=100)
    with pytest.raises(ValueError, match="routes"):
        learner.backward(add_advantages(batch, group_mean, {}))
