"""A fault as a value: ranges, JSON and pickle, and what is drawn at random for a model."""

from __future__ import annotations

import json
import pickle
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keel.causes import CAUSES
from keel.config_load import ConfigError, dump, parse
from keel.distortion import (
    STRENGTHS,
    Distortion,
    DistortionError,
    applies,
    describe_planted,
    planted_metrics,
    random_distortions,
    tensor_group_names,
)
from keel.models.info import model_info
from keel.models.tiny import PRESETS, build_tiny_model, tiny_config
from keel.sync.groups import tensor_groups
from keel.types import SamplingSettings

INFOS = {preset: model_info(tiny_config(preset, vocab_size=400)) for preset in PRESETS}
PLAIN, CUT = SamplingSettings(), SamplingSettings(0.7, 0.9, 20)


def test_every_cause_has_a_strength():
    assert set(STRENGTHS) == set(CAUSES)


@pytest.mark.parametrize("cause", CAUSES)
def test_a_strength_outside_its_range_is_refused_and_the_range_is_told(cause):
    told = STRENGTHS[cause]
    group = "embed" if cause == "stale_tensor_group" else ""
    for outside in (told.low - 0.1, told.high + 0.1, float("nan")):
        with pytest.raises(DistortionError, match=re.escape(f"from {told.low:g} to {told.high:g}")):
            Distortion(cause, outside, group=group)
    assert not Distortion(cause, 0, group=group).acts
    assert Distortion(cause, told.high, group=group).acts


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"cause": "sinks"}, "known: sinks_dropped"),
        ({"cause": "stale_version", "strength": 1.5}, "a whole number from 0 to 64"),
        ({"cause": "wrong_template", "strength": 1, "group": "x"}, "it may be ''"),
        ({"cause": "stale_tensor_group"}, "name the tensor group"),
        ({"cause": "shifted_logprobs", "layer": 2}, "have layers"),
    ],
)
def test_what_makes_no_sense_is_refused_in_code_and_in_a_config(values, told):
    with pytest.raises(DistortionError, match=re.escape(told)):
        Distortion(**values)
    text = json.dumps(values).replace('":', '" =')
    with pytest.raises(ConfigError) as refused:
        parse(f"[engine]\ndistortions = [{text}]", "run.toml")
    assert told in str(refused.value)
    assert "run.toml:2" in str(refused.value)


def test_a_config_with_faults_is_read_as_it_is_written():
    text = (
        '[model.tiny]\npreset = "gpt_oss"\n[engine]\ndistortions = [{ cause = "window_off", layer = 2 }]\n'
        '[learner]\ndistortions = [{ cause = "stale_version", strength = 2, seed = 5 }]'
    )
    config = parse(text)
    assert config.engine.distortions == (Distortion("window_off", layer=2),)
    assert parse(dump(config)) == config
    with pytest.raises(ConfigError, match=r"learner\.ranks = 1"):
        parse(text, sets=["learner.ranks=2"])


@given(st.randoms(use_true_random=False), st.sampled_from(sorted(INFOS)), st.sampled_from(["engine", "learner"]))
def test_random_faults_differ_fit_the_model_and_go_through_json_and_pickle(rng, preset, side):
    info = INFOS[preset]
    for sampling in (PLAIN, CUT):
        drawn = random_distortions(rng, 5, side, info, sampling)
        assert len({each.cause for each in drawn}) == 5
        for each in drawn:
            assert each.acts
            assert applies(each.cause, side, info, sampling)
            assert any(low <= each.strength <= high for low, high in STRENGTHS[each.cause].shown)
            assert Distortion(**json.loads(json.dumps(each.to_json()))) == each
            assert pickle.loads(pickle.dumps(each)) == each


def test_what_applies_to_a_model():
    def causes(preset, side, sampling=PLAIN):
        return {cause for cause in CAUSES if applies(cause, side, INFOS[preset], sampling)}

    assert set(CAUSES) - causes("gpt_oss", "engine") == {"raw_logprobs"}
    assert set(CAUSES) - causes("gpt_oss", "learner", CUT) == set()
    assert set(CAUSES) - causes("qwen3", "learner") == {
        *("sinks_dropped", "window_off", "window_off_by_one", "transposed_experts", "router_flips"),
        *("raw_logprobs", "top_p_not_undone"),
    }
    assert "router_flips" in causes("qwen3_moe", "learner")
    with pytest.raises(DistortionError, match="2 apply: stale_version, wrong_template"):
        random_distortions(
            random.Random(0), 3, "engine", INFOS["qwen3"], PLAIN, among=("stale_version", "wrong_template")
        )


@pytest.mark.parametrize("preset", PRESETS)
def test_tensor_groups_are_named_as_the_weight_check_names_them(preset):
    model = build_tiny_model(preset, vocab_size=400)
    known = tensor_groups(name for name, _ in model.named_parameters())
    assert set(tensor_group_names(INFOS[preset])) <= set(known)


def test_a_run_tells_only_of_faults_that_act():
    assert planted_metrics((), (Distortion("window_off", 0),)) == {}
    assert describe_planted((), (Distortion("window_off", 0),)) == ""
    faults = (Distortion("window_off", layer=1), Distortion("stale_tensor_group", 0.5, group="embed"))
    assert planted_metrics(faults, ()) == {"faults/engine": 2.0, "faults/learner": 0.0}
    told = describe_planted(faults, ())
    assert "window_off 1 (layer 1) in the engine" in told
    assert "stale_tensor_group 0.5 (embed) in the engine" in told


def test_the_page_has_every_cause_with_its_range():
    page = (Path(__file__).parents[2] / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = {row.split("`")[1]: row for row in page.splitlines() if row.startswith("| `")}
    assert set(rows) == set(CAUSES)
    for cause, row in rows.items():
        told = STRENGTHS[cause]
        assert f"| {told.low:g} to {told.high:g} |" in row, cause
        assert all(f"`{group}`" in row for group in (told.groups or ()) if group not in DEFAULTS), cause


DEFAULTS = ("", "weights", "transposed", "attended")
