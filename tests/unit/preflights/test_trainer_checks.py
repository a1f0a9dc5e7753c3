"""The trainer's half of a preflight: its layers against slow twins, without any engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from keel.distortion import Distortion
from keel.learner.distorted import distort_learner
from keel.models import attention as keel_attention
from keel.models.policy import PolicyModel
from keel.preflights.checks import attention, trainer
from keel.preflights.checks.layers import layer_sequence
from keel.preflights.context import Context, SkippedError
from keel.preflights.gap import Noise, judged_mean
from keel.preflights.probes import ProbePlan
from keel.preflights.result import Check
from keel.preflights.runner import told_by_checks
from keel.preflights.stack import ModelSource, ScoredSequence, Stack
from keel.preflights.trainer_keel import KeelTrainer
from keel.preflights.trainer_plain import PlainTrainer, TrainerError
from keel.types import SamplingSettings, Support

LAYER_CHECKS = (attention.check_attention, attention.check_windows)


def context_of(side: Any, path: str) -> Context:
    """A context whose engine is never asked."""
    stack = Stack(ModelSource(path, side.dtype), side, None, None, None)  # type: ignore[arg-type]
    return Context(stack, ProbePlan(max_sequence_tokens=128), 60.0)


def keel_context(path: str, dtype: str = "float32") -> Context:
    return context_of(KeelTrainer(PolicyModel.load(path, dtype=dtype), max_tokens=200, dtype=dtype), path)


def plain_context(path: str, attn: str = "eager") -> Context:
    return context_of(PlainTrainer.load(ModelSource(path, "float32"), attention=attn), path)


def only(found: Iterator[Check]) -> Check:
    (check,) = found
    return check


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3", "qwen3_moe"])
def test_keel_s_layers_pass(preset, dtype, tiny_checkpoint):
    context = keel_context(tiny_checkpoint(preset), dtype)
    for ask in (*LAYER_CHECKS, attention.check_backends):
        assert only(ask(context)).status == "pass", ask
    if preset != "qwen3":
        assert only(trainer.check_experts(context)).status == "pass"
    if preset == "gpt_oss":
        found = only(attention.check_sinks(context))
        assert found.status == "pass"
        assert len(found.details["changes"]) == 4


@pytest.mark.parametrize(("preset", "attn"), [("gpt_oss", "eager"), ("gpt_oss", "keel"), ("qwen3_moe", "sdpa")])
def test_layers_of_plain_transformers_pass(preset, attn, tiny_checkpoint):
    context = plain_context(tiny_checkpoint(preset), attn)
    for ask in (*LAYER_CHECKS, trainer.check_experts):
        assert only(ask(context)).status == "pass", ask


@pytest.mark.parametrize(
    ("cause", "strength"), [("window_off", 1.0), ("window_off_by_one", 1), ("window_off_by_one", -1)]
)
def test_a_window_that_is_not_the_layer_s_is_seen_in_its_layers_alone(cause, strength, tiny_checkpoint):
    context = keel_context(tiny_checkpoint("gpt_oss"))
    side: Any = context.stack.trainer
    with distort_learner(side.policy, [Distortion(cause, strength)]):
        windows, dense = only(attention.check_windows(context)), only(attention.check_attention(context))
    assert (windows.status, dense.status) == ("fail", "fail")
    assert {fault.split()[1] for fault in windows.details["faults"]} <= {"0", "2"}
    wrong = {row["layer"] for row in dense.details["layers"] if row["value"] > dense.threshold}
    assert wrong == {0, 2}


def test_sinks_that_a_kernel_leaves_out_are_seen(tiny_checkpoint, monkeypatch):
    context = keel_context(tiny_checkpoint("gpt_oss"))
    real = keel_attention.sink_attention

    def without(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: Any, **options: Any) -> torch.Tensor:
        return real(q, k, v, None, **options)

    monkeypatch.setattr(keel_attention, "sink_attention", without)
    side: Any = context.stack.trainer
    for parameter in side.model.parameters():
        parameter.requires_grad_(parameter.shape != side.model.base_model.layers[0].self_attn.sinks.shape)
    assert only(attention.check_attention(context)).status == "fail"
    found = only(attention.check_sinks(context))
    assert found.status == "fail"
    assert "not used" in found.reason


def test_experts_that_compute_something_else_are_seen(tiny_checkpoint):
    context = keel_context(tiny_checkpoint("gpt_oss"))
    side: Any = context.stack.trainer
    experts = side.model.base_model.layers[1].mlp.experts
    experts.forward = lambda hidden, *_args, **_kwargs: (
        1.001 * type(experts).forward(experts, hidden, *_args, **_kwargs)
    )
    found = only(trainer.check_experts(context))
    assert found.status == "fail"
    assert "layer 1" in found.reason


def test_a_model_without_sinks_or_experts_is_skipped_with_the_reason(tiny_checkpoint):
    context = keel_context(tiny_checkpoint("qwen3"))
    with pytest.raises(SkippedError, match="no attention sinks"):
        only(attention.check_sinks(context))
    with pytest.raises(SkippedError, match="no experts"):
        only(trainer.check_experts(context))


def test_checks_leave_weights_and_gradients_as_they_were(tiny_checkpoint):
    context = keel_context(tiny_checkpoint("gpt_oss"))
    before = {name: p.detach().clone() for name, p in context.stack.trainer.model.named_parameters()}
    for ask in (*LAYER_CHECKS, attention.check_sinks, trainer.check_experts):
        only(ask(context))
    for name, parameter in context.stack.trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None, name
    assert context.stack.trainer.model.config._attn_implementation == "keel"


def sequences(cut: bool) -> list[ScoredSequence]:
    rng = np.random.default_rng(1)
    found = []
    for size in (9, 40, 77):
        tokens = rng.integers(0, 320, size)
        drawn = np.arange(size) >= 5
        drawn[8:12] = False
        rows = [sorted({int(token), 3, 5, 300}) for token in tokens[drawn]]
        support = Support(tuple(map(len, rows)), np.concatenate(rows).astype(np.uint32).tobytes()) if cut else None
        sampling = SamplingSettings(0.7, 1.0, 4) if cut else SamplingSettings(1.3)
        found.append(ScoredSequence(tokens.astype(np.int64), drawn, sampling, support))
    return found


@pytest.mark.parametrize("cut", [False, True])
def test_both_trainers_say_what_logits_say(cut, tiny_checkpoint):
    path = tiny_checkpoint("gpt_oss")
    mine, plain = keel_context(path).stack.trainer, plain_context(path).stack.trainer
    asked = sequences(cut)
    for each, ours, theirs in zip(asked, mine.score(asked, with_routes=True), plain.score(asked), strict=True):
        with torch.no_grad():
            logits = plain.model(torch.from_numpy(each.token_ids)[None]).logits[0, :-1].double().numpy()
        at = 0
        for row, token in enumerate(each.token_ids[1:]):
            values = logits[row].copy()
            if each.drawn[row + 1]:
                values /= each.sampling.temperature
                if each.support is not None:
                    ids = np.frombuffer(each.support.ids, np.uint32)[
                        at : at + each.support.counts[int(each.drawn[: row + 1].sum())]
                    ]
                    at += len(ids)
                    kept = np.full_like(values, -np.inf)
                    kept[ids] = values[ids]
                    values = kept
            right = values[token] - np.log(np.exp(values - values.max()).sum()) - values.max()
            assert ours.logprobs[row + 1] == pytest.approx(right, abs=2e-5)
            assert theirs.logprobs[row + 1] == pytest.approx(right, abs=2e-5)
        assert np.isnan(ours.logprobs[0])
        assert ours.routes is not None
        assert ours.routes.shape == (len(each.token_ids) - 1, 4, 2)


def test_padding_on_either_side_changes_nothing(tiny_checkpoint):
    side: Any = plain_context(tiny_checkpoint("gpt_oss")).stack.trainer
    asked = sequences(cut=False)
    left, right = (side.batch_logprobs(asked, padded=padded) for padded in ("left", "right"))
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a[1:], b[1:], atol=2e-5)


def test_a_layer_s_sequence_crosses_its_window_twice(tiny_checkpoint):
    assert len(layer_sequence(keel_context(tiny_checkpoint("gpt_oss"))).token_ids) == 2 * 32 + 21


def test_outliers_are_left_out_only_after_a_near_tie():
    near = np.array([False, True, True, False])
    noise = Noise(1e-6, 1e-6, near, "float64", np.zeros(4, np.float32), excused_share=0.3)
    mean, left_out = judged_mean(np.array([1e-6, 1e-2, 1e-6, 1e-6]), noise)
    assert (mean, left_out) == (pytest.approx(1e-6), 1)
    mean, left_out = judged_mean(np.array([1e-2, 1e-6, 1e-6, 1e-6]), noise)
    assert (mean, left_out) == (pytest.approx(2.5e-3, rel=1e-2), 0)
    assert judged_mean(np.array([np.inf, 0, 0, 0]), noise)[0] == np.inf


def test_a_check_that_names_a_cause_adds_it_once_for_each_group():
    check = Check("weights", "t", "fail", "r", 2.0, details={"cause": "stale_tensor_group", "stale": ["a", "b"]})
    found = list(told_by_checks([check], []))
    assert [(each.cause, each.group) for each in found] == [("stale_tensor_group", "a"), ("stale_tensor_group", "b")]
    assert [each.group for each in told_by_checks([check], found[:1])] == ["b"]
    assert not list(told_by_checks([Check("gap", "t", "pass", "r")], []))


def test_a_trainer_that_cannot_be_had_is_refused_in_words(tmp_path, tiny_checkpoint):
    with pytest.raises(TrainerError, match="cannot be loaded"):
        PlainTrainer.load(ModelSource(str(tmp_path), "float32"), attention="eager")
    with pytest.raises(TrainerError, match="known: float32"):
        PlainTrainer.load(ModelSource(tiny_checkpoint("qwen3"), "int4"), attention="eager")
