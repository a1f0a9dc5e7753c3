"""On-policy means ratio 1 to the bit, proven by a second pass; planted faults must be seen by it."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import contextmanager

import pytest
import torch

from keel.algo.advantage import group_mean
from keel.algo.apply import add_advantages, correct
from keel.algo.correction import token_truncated
from keel.batch import pack
from keel.config import AlgoConfig, LearnerConfig, ModelConfig, OptimConfig, Plugin, Stage
from keel.learner.learner import Learner
from keel.learner.replay import old_streams
from keel.models.router import replay_routes
from keel.types import Verdict

PRESETS = ("gpt_oss", "qwen3", "qwen3_moe")
SMALL = {"num_hidden_layers": 2}
MOE_ONLY_SMALL = {"gpt_oss": {}, "qwen3": {}, "qwen3_moe": {"mlp_only_layers": []}}


def make_learner(
    tiny_checkpoint, preset, dtype="float32", checkpointing=False, hidden_size=None, replay="auto", **algo
):
    size = {} if hidden_size is None else {"hidden_size": hidden_size}
    path = tiny_checkpoint(preset, **SMALL, **MOE_ONLY_SMALL[preset], **size)
    config = ModelConfig(path=path, dtype=dtype, gradient_checkpointing=checkpointing)
    learner = Learner(config, LearnerConfig(replay_routes=replay))
    learner.enter(Stage("reinforcement", 0, 10, AlgoConfig(**algo), OptimConfig(lr=1e-3)))
    return learner


def scored_by(learner, batch):
    return learner._scored(batch, functools.partial(old_streams, learner.acting))


def make_batch(make_groups, num_micro_batches=4, num_updates=1):
    groups = make_groups(4, 4, longest=30)
    whole = pack(groups, max_tokens=10_000)
    total = whole.micro_batches[0].num_tokens
    if num_micro_batches == 16:
        budget = 1  # a micro-batch for each of the 16 sequences
    else:
        budget = total if num_micro_batches == 1 else int(total / num_micro_batches * 1.15)
    batch = pack(groups, max_tokens=budget, num_updates=num_updates)
    assert num_updates > 1 or len(batch.micro_batches) == num_micro_batches
    return add_advantages(batch, group_mean, {})


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_policy_is_exact(tiny_checkpoint, make_groups, preset, dtype):
    """Over 1, 4 and 16 micro-batches and two steps each, with and without gradient checkpointing."""
    for checkpointing in (False, True):
        learner = make_learner(tiny_checkpoint, preset, dtype, checkpointing)
        for num_micro_batches in (1, 4, 16):
            update = learner.backward(make_batch(make_groups, num_micro_batches))
            assert update.metrics["policy/ratio_max_dev"] == 0.0
            assert update.metrics["policy/recompute_max_dev"] == 0.0
            assert update.metrics["policy/clip_fraction"] == 0.0
            assert update.grad_norm > 0.0
            learner.apply(update, Verdict())


def dropout(learner):
    for layer in learner.policy.model.base_model.layers:
        layer.self_attn.register_forward_hook(lambda _m, _i, out: (torch.dropout(out[0], 0.1, True), *out[1:]))
    return learner


@pytest.mark.parametrize("preset", PRESETS)
def test_dropout_is_seen(tiny_checkpoint, make_groups, preset):
    update = dropout(make_learner(tiny_checkpoint, preset)).backward(make_batch(make_groups))
    assert update.metrics["policy/ratio_max_dev"] == 0.0  # by construction: which is why it proves nothing
    assert update.metrics["policy/recompute_max_dev"] > 1e-3


@contextmanager
def second_pass(policy, change):
    """Every second forward pass of `policy` is `change(micro_batch, forward)`: the check's own pass."""
    original, calls = policy.forward, [0]

    def forward(micro_batch, **options):
        calls[0] += 1
        if calls[0] % 2 == 1:
            return original(micro_batch, **options)
        return change(micro_batch, lambda m: original(m, **options))

    policy.forward = forward
    try:
        yield
    finally:
        del policy.forward


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_re_routed_pass_is_seen(tiny_checkpoint, make_groups, preset, dtype):
    """One token sent to one other expert in one layer."""
    learner = make_learner(tiny_checkpoint, preset, dtype)
    policy = learner.policy

    def re_routed(micro_batch, forward):
        info = policy.info
        with torch.no_grad():
            hidden = policy.trunk(
                micro_batch.input_ids,
                micro_batch.positions,
                with_routes=True,
                cu_seq_lens_q=micro_batch.cu_seqlens,
                cu_seq_lens_k=micro_batch.cu_seqlens,
                max_length_q=micro_batch.max_seqlen,
                max_length_k=micro_batch.max_seqlen,
            )
        routes = torch.full_like(hidden[1], -1)
        row = int(micro_batch.loss_mask.nonzero()[0])
        chosen = set(hidden[1][row, 0].tolist())
        routes[row, 0] = hidden[1][row, 0]
        routes[row, 0, -1] = min(set(range(info.num_experts)) - chosen)
        with replay_routes(routes):
            return forward(micro_batch)

    batch = make_batch(make_groups)
    with second_pass(policy, re_routed):
        update = learner.backward(batch)
    assert update.metrics["policy/recompute_max_dev"] > 1e-4
    assert learner.backward(batch).metrics["policy/recompute_max_dev"] == 0.0


@pytest.mark.parametrize("preset", PRESETS)
def test_another_split_is_seen(tiny_checkpoint, make_groups, preset):
    """Scored in one micro-batch, trained one sequence at a time: equal tokens, other bits, in float32 or in bfloat16.

    Which of the two depends on the CPU's matrix kernels, hence both. The ratio shows it when the scores are foreign,
    the check when its own pass is.
    """
    ratios, recomputed = [], []
    for dtype in ("float32", "bfloat16"):
        learner = make_learner(tiny_checkpoint, preset, dtype, updates_per_batch=2, hidden_size=576, replay="off")
        each, whole = make_batch(make_groups, 16), make_batch(make_groups, 1)
        assert learner.backward(learner.score(each)).metrics["policy/ratio_max_dev"] == 0.0
        scored = learner.score(whole)
        (one,) = scored.micro_batches
        foreign, start = [], 0
        for m in each.micro_batches:
            foreign.append(dataclasses.replace(m, old_logprobs=one.old_logprobs[start : start + m.num_tokens]))
            start += m.num_tokens
        ratios.append(learner.backward(each.with_micro_batches(foreign)).metrics["policy/ratio_max_dev"])
        with second_pass(learner.policy, one_by_one):
            recomputed.append(learner.backward(scored).metrics["policy/recompute_max_dev"])
    assert max(ratios) > 0.0
    assert max(recomputed) > 0.0


def one_by_one(micro_batch, forward):
    parts = [forward(_sequence(micro_batch, index)) for index in range(micro_batch.num_sequences)]
    return dataclasses.replace(parts[0], logprobs=torch.cat([part.logprobs for part in parts]))


def _sequence(m, index):
    start, stop = m.cu_seqlens[index : index + 2].tolist()
    streams = {
        f.name: getattr(m, f.name)[start:stop]
        for f in dataclasses.fields(m)
        if isinstance(getattr(m, f.name), torch.Tensor) and getattr(m, f.name).shape[0] == m.num_tokens
    }
    streams["cu_seqlens"] = torch.tensor([0, stop - start], dtype=torch.int32)
    return dataclasses.replace(m, **streams, max_seqlen=stop - start)


def test_with_several_updates_the_first_ratio_is_one_and_the_second_moves(tiny_checkpoint, make_groups):
    learner = make_learner(tiny_checkpoint, "gpt_oss", updates_per_batch=2)
    batch = learner.score(make_batch(make_groups, num_updates=2))
    first = learner.backward(batch, 0)
    assert first.metrics["policy/ratio_max_dev"] == 0.0
    learner.apply(first, Verdict())
    second = learner.backward(batch, 1)
    assert second.metrics["policy/ratio_max_dev"] > 1e-4
    assert second.metrics["policy/recompute_max_dev"] == 0.0
    assert (learner.step, learner.version) == (0, 1)
    learner.apply(second, Verdict())
    assert (learner.step, learner.version) == (1, 2)


def test_weights_made_in_the_loss_are_those_of_a_scored_batch(tiny_checkpoint, make_groups):
    """Token-local correction, detached or from a score pass: the same gradient to the bit."""
    correction = Plugin(id="token_truncated", cap=1.5)
    learner = make_learner(tiny_checkpoint, "gpt_oss", correction=(correction,))
    batch = make_batch(make_groups)
    detached = learner.backward(batch)
    scored = correct(scored_by(learner, batch), [(token_truncated, {"cap": 1.5})])
    again = learner.backward(scored)
    assert detached.grad_norm == again.grad_norm
    assert detached.loss == again.loss
    share = "correction/truncated_share"
    assert detached.metrics[share] == pytest.approx(again.metrics[share])
    assert 0.0 < detached.metrics[share] < 1.0
    assert make_learner(tiny_checkpoint, "gpt_oss").backward(batch).grad_norm != detached.grad_norm


def test_weights_made_in_the_loss_are_told(tiny_checkpoint, make_groups):
    """Of every micro-batch, in one stream; a scored batch has them already and gets no second one."""
    learner = make_learner(tiny_checkpoint, "gpt_oss", correction=(Plugin(id="token_truncated", cap=1.5),))
    batch = make_batch(make_groups)
    update = learner.backward(batch)
    for index, micro_batch in enumerate(batch.micro_batches):
        streams = update.streams[index]
        gap = streams["logprobs"] - micro_batch.rollout_logprobs
        drawn = micro_batch.policy_version >= 0
        assert torch.equal(streams["importance_weights"][drawn], gap.exp().clamp(max=1.5)[drawn])
    scored = correct(scored_by(learner, batch), [(token_truncated, {"cap": 1.5})])
    assert all("importance_weights" not in streams for streams in learner.backward(scored).streams.values())
