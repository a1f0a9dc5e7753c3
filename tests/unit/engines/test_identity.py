"""Two sides of one model: what differs is named; what says nothing about the function is no difference."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from keel.config import TrainConfig
from keel.config_problems import ConfigError
from keel.engine_checks import check_engine, check_resumed
from keel.engines.base import EngineCapabilities
from keel.engines.identity import IdentityError, ModelIdentity, differences, identity_of, refuse_differences
from keel.models.tiny import build_tiny_model, build_tiny_tokenizer

CAN = EngineCapabilities("other", 100, 4, False, True, False, ("file",), True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("identity") / "model"
    build_tiny_model("qwen3", path, vocab_size=320, seed=1, num_hidden_layers=2)
    build_tiny_tokenizer(["one two three four five"] * 4, 320, style="chatml").save_pretrained(path)
    return path


@pytest.fixture
def copy(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "copy"))


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_copy_is_the_same_model_and_so_is_one_saved_again(model, copy, tmp_path):
    ours = identity_of(model)
    assert ours.tokenizer
    assert ours.template
    assert ours.config["vocab_size"] == "320"
    assert differences(ours, identity_of(copy)) == []
    change_json(copy / "config.json", dtype="bfloat16", use_cache=False, transformers_version="9")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer("a text", padding="max_length", max_length=9)  # what a caller did with it is no difference
    tokenizer.save_pretrained(copy)
    assert differences(ours, identity_of(copy)) == []
    assert ModelIdentity.from_json(json.loads(json.dumps(ours.to_json()))) == ours


def test_each_kind_of_difference_is_named(model, copy):
    ours = identity_of(model)
    template = copy / "chat_template.jinja"
    settings = copy / "tokenizer_config.json"
    if template.is_file():
        template.write_text(template.read_text() + " ")
    else:
        change_json(settings, chat_template=json.loads(settings.read_text())["chat_template"] + " ")
    change_json(copy / "config.json", rms_norm_eps=1e-3)
    tokens = json.loads((copy / "tokenizer.json").read_text())
    first, second = list(tokens["model"]["vocab"])[:2]
    vocab = tokens["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (copy / "tokenizer.json").write_text(json.dumps(tokens))
    found = differences(ours, identity_of(copy))
    assert [any(word in each for each in found) for word in ("the tokenizer", "chat template", "rms_norm_eps")] == [
        True,
        True,
        True,
    ]
    assert len(found) == 3
    with pytest.raises(IdentityError, match=r"the learner \(.*differ in the tokenizer .*; serve that one"):
        refuse_differences(ours, identity_of(copy), who=("the learner", "the engine"), fix="serve that one")


def test_what_one_side_does_not_know_is_no_difference(model):
    ours = identity_of(model)
    assert differences(ours, ModelIdentity("a server")) == []
    assert differences(dataclasses.replace(ours, revision="abc"), ours) == []
    named = dataclasses.replace(ours, revision="abc"), dataclasses.replace(ours, revision="abd")
    assert differences(*named) == ["the revision (abc and abd)"]


def test_a_directory_without_tokenizer_or_config_says_nothing_of_it(copy):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        (copy / name).unlink(missing_ok=True)
    assert identity_of(copy) == ModelIdentity(str(copy))


def test_an_engine_of_another_model_is_refused_unless_that_is_the_fault_that_was_planted(model):
    ours = identity_of(model)
    other = dataclasses.replace(CAN, identity=dataclasses.replace(ours, template="other"))
    with pytest.raises(IdentityError, match="chat template"):
        check_engine(TrainConfig(), other, ours)
    check_engine(TrainConfig(), dataclasses.replace(CAN, identity=ours), ours)
    check_engine(TrainConfig(), CAN, ours)
    with pytest.raises(IdentityError, match=r"the checkpoint .*put the files back"):
        check_resumed(other.identity, ours)


def test_an_engine_that_cannot_tell_what_the_learner_must_know_is_refused(model):
    ours = identity_of(model)
    cut = {"rollout": {"top_p": 0.9, "top_k": 20}}
    with pytest.raises(ConfigError, match="does not say what the cut left"):
        check_engine(TrainConfig.model_validate(cut), CAN, ours)
    check_engine(TrainConfig.model_validate(cut), dataclasses.replace(CAN, returns_support=True), ours)
    check_engine(TrainConfig.model_validate({**cut, "learner": {"missing_support": "own_cut"}}), CAN, ours)
    check_engine(TrainConfig.model_validate({**cut, "steps": 0}), CAN, ours)
    demanded = {"learner": {"replay_routes": "on"}}
    with pytest.raises(ConfigError, match="no expert choices"):
        check_engine(TrainConfig.model_validate(demanded), CAN, ours)
    check_engine(TrainConfig.model_validate(demanded), dataclasses.replace(CAN, returns_routes=True), ours)
    check_engine(TrainConfig.model_validate({**demanded, "algo": {"updates_per_batch": 2}}), CAN, ours)
