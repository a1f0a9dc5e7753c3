"""The learner's side recomputed, against plain transformers; and where a log says what it drew with."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import keel
from keel.gap.log import GapLog, GapLogError, LoggedSequence
from keel.gap.measure import measure, route_difference
from keel.gap.recompute import load_model, with_learner

IDS = [5, 9, 200, 31, 7, 88, 140, 3, 250, 17]
DRAWN = [0, 0, 0, 1, 1, 0, 1, 1, 1, 1]


def plain_logprobs(path, temperature):
    """What `transformers` says by itself, with nothing of Keel's registered, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0, :-1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].numpy()


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_recomputed_side_is_the_models(tiny_checkpoint, preset, temperature):
    path = tiny_checkpoint(preset)
    expected = np.concatenate([[0.0], plain_logprobs(path, temperature)])
    engine = np.where(DRAWN, expected - 0.125, 0.0)
    given = {"token_ids": IDS, "drawn": DRAWN, "rollout_logprobs": engine}
    report = keel.mismatch(given, model=path, temperature=temperature)
    assert report.recomputed == f"{path} in float32"
    assert report.num_tokens == sum(DRAWN)
    assert report.statistics["abs_max"] == pytest.approx(0.125, abs=5e-6)
    assert report.statistics["k1"] == pytest.approx(-0.125, abs=5e-6)
    logged = {**given, "temperature": [temperature] * len(IDS)}  # the log's own goes before what is given
    assert keel.mismatch(logged, model=path, temperature=3.0).statistics == report.statistics


def test_a_side_that_the_log_has_is_left_alone(tiny_checkpoint):
    given = {"token_ids": IDS, "drawn": DRAWN, "rollout_logprobs": [-1.0] * 10, "learner_logprobs": [-1.5] * 10}
    report = keel.mismatch(given, model=tiny_checkpoint("qwen3"))
    assert (report.recomputed, report.statistics["abs_max"]) == ("", 0.5)


def test_routes_are_compared_as_sets(tiny_checkpoint):
    policy = load_model(tiny_checkpoint("gpt_oss"))
    ids, drawn = np.array(IDS), np.array(DRAWN, dtype=bool)
    layers, k = policy.info.num_moe_layers, policy.info.top_k
    bare = LoggedSequence(
        "here", "one", ids, drawn, np.full(10, -1.0), routes=np.zeros((10, layers, k), dtype=np.int32)
    )
    (own,) = with_learner(GapLog("x", (bare,)), policy).sequences
    assert own.learner_routes.shape == (10, layers, k)
    assert (own.learner_routes[-1] == -1).all()  # the last token was never fed
    same = dataclasses.replace(own, routes=own.learner_routes[..., ::-1].copy())
    assert route_difference((same,)) == {"route_diff": 0.0}
    other = same.routes.copy()
    other[2, 0, 0] = next(e for e in range(policy.info.num_experts) if e not in other[2, 0])
    flipped = dataclasses.replace(same, routes=other)
    assert route_difference((flipped,)) == {"route_diff": pytest.approx(1 / 9)}
    told = {each.position: each.routed_differently for each in measure(GapLog("x", (flipped,))).worst}
    assert told == {place: place == 3 for place in np.flatnonzero(drawn)}  # token 2 was fed to predict token 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"token_ids": None}, "has no token ids"),
        ({"token_ids": [10_000] * 10}, "token id 10000 is beyond the model's vocabulary"),
        ({"drawn": [1] * 10}, "its first token is said to be drawn"),
    ],
)
def test_what_cannot_be_recomputed_is_refused(tiny_checkpoint, change, said):
    given = {"token_ids": IDS, "drawn": DRAWN, "rollout_logprobs": [-1.0] * 10, **change}
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(GapLogError, match=said):
        keel.mismatch(given, model=tiny_checkpoint("qwen3"))


def test_a_wrong_model_dtype_or_temperature_is_refused_in_words(tmp_path, tiny_checkpoint):
    given = {"token_ids": IDS, "drawn": DRAWN, "rollout_logprobs": [-1.0] * 10}
    for options, said in (
        ({"model": tmp_path}, "cannot be loaded"),
        ({"model": tiny_checkpoint("qwen3"), "dtype": "float8"}, "float32 or bfloat16"),
        ({"model": tiny_checkpoint("qwen3"), "temperature": 0.0}, "is above 0"),
    ):
        with pytest.raises(GapLogError, match=said):
            keel.mismatch(given, **options)
