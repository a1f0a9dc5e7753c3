"""Recording and replaying routes: by context, by thread, and never by accident."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from keel.models.router import (
    ChosenOfSoftmaxRouter,
    RouteRecorder,
    SoftmaxOfChosenRouter,
    record_routes,
    replace_routers,
    replay_routes,
    route_margin,
)
from keel.models.tiny import tiny_config

TOKENS = 40


def make_pair(preset, **overrides):
    config = tiny_config(preset, vocab_size=300, **overrides)
    source = (GptOssTopKRouter if preset == "gpt_oss" else Qwen3MoeTopKRouter)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    declared = (SoftmaxOfChosenRouter if preset == "gpt_oss" else ChosenOfSoftmaxRouter)(source, 0)
    return source, declared, torch.randn(TOKENS, config.hidden_size, generator=generator)


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [("gpt_oss", {}), ("qwen3_moe", {"norm_topk_prob": True}), ("qwen3_moe", {"norm_topk_prob": False})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_outputs_as_the_router_it_replaces(preset, overrides, dtype):
    source, declared, hidden = make_pair(preset, **overrides)
    source.to(dtype)
    declared.to(dtype)
    for ours, theirs in zip(declared(hidden.to(dtype)), source(hidden.to(dtype)), strict=True):
        assert torch.equal(ours, theirs)


def test_parameters_are_the_same_objects_under_the_same_names():
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", vocab_size=300))
    before = dict(model.named_parameters())
    routers = replace_routers(model)
    assert [router.moe_layer for router in routers] == [0, 1, 2]
    assert all(type(router) is ChosenOfSoftmaxRouter for router in routers)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert replace_routers(model) == ()


def test_recording_is_bounded_by_its_context_and_thread():
    _, router, hidden = make_pair("gpt_oss")
    recorder = RouteRecorder(1)
    router(hidden)
    with record_routes(recorder):
        other = threading.Thread(target=router, args=(hidden,))
        other.start()
        other.join()
        with pytest.raises(RuntimeError, match="were not recorded"):
            recorder.routes()
        chosen = router(hidden)[2]
    router(hidden.flip(0))
    assert torch.equal(recorder.routes()[:, 0], chosen.to(torch.int32))


def test_a_layer_that_never_ran_is_named():
    recorder = RouteRecorder(3)
    recorder.record(0, *[torch.zeros(2, 1, dtype=torch.int64)] * 2, torch.zeros(2, 4))
    recorder.record(2, *[torch.zeros(2, 1, dtype=torch.int64)] * 2, torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match=r"layers \[1\] of 3"):
        recorder.routes()


def test_margin_is_the_gap_to_the_first_expert_left_out():
    logits = torch.tensor([[5.0, 1.0, 4.5, 4.25], [0.0, 2.0, 2.0, 2.0]])
    assert route_margin(logits, 2).tolist() == [0.25, 0.0]
    assert route_margin(logits, 4).tolist() == [float("inf")] * 2


def test_replay_keeps_the_routers_own_weights_for_the_forced_experts_and_fills_unknown_ones():
    _, router, hidden = make_pair("gpt_oss")
    logits, _, own = router(hidden)
    forced = (own + 1) % router.num_experts
    forced[3] = -1
    with replay_routes(forced[:, None].to(torch.int32)):
        _, weights, chosen = router(hidden)
    expected = torch.where(forced < 0, own, forced)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(weights, torch.softmax(logits.gather(-1, expected), -1))
    weights[0, 0].backward()
    assert router.weight.grad.abs().sum() > 0
    assert torch.equal(router(hidden)[2], own), "replay must end with its context"


def test_replay_of_other_tokens_routes_is_refused():
    _, router, hidden = make_pair("gpt_oss")
    with (
        replay_routes(torch.zeros(TOKENS - 1, 1, 2, dtype=torch.int32)),
        pytest.raises(ValueError, match="same tokens"),
    ):
        router(hidden)
    with pytest.raises(ValueError, match="needs integer"), replay_routes(torch.zeros(TOKENS, 1, 2)):
        pass


def test_a_choice_that_is_known_in_part_is_made_anew_as_a_whole():
    """Filled up with experts of its own it could name one twice."""
    _, router, hidden = make_pair("gpt_oss")
    own = router(hidden)[2]
    forced = own.flip(-1).clone()
    forced[::2, 0] = -1
    with replay_routes(forced[:, None].to(torch.int32)):
        chosen = router(hidden)[2]
    assert torch.equal(chosen[::2], own[::2])
    assert torch.equal(chosen[1::2], forced[1::2])
