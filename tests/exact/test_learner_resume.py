"""A learner restarted from a checkpoint goes on with the same bits, here and in a process of its own."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from keel.algo.advantage import group_mean
from keel.algo.apply import add_advantages
from keel.batch import pack
from keel.config import AlgoConfig, KLConfig, LearnerConfig, ModelConfig, OptimConfig, Plugin, Stage
from keel.learner.checkpoint import CheckpointError, latest_checkpoint
from keel.learner.learner import Learner
from keel.models.tiny import build_tiny_model, build_tiny_tokenizer
from keel.sync.base import WeightSource
from keel.types import Verdict

WARM = Stage("warm_start", 0, 2, AlgoConfig(loss=Plugin(id="cross_entropy")), OptimConfig(lr=1e-2))
REINFORCE = Stage(
    "reinforcement",
    2,
    4,
    AlgoConfig(kl=KLConfig(coefficient=0.2), updates_per_batch=2),
    OptimConfig(lr=3e-3, schedule="cosine", warmup_steps=1, weight_decay=0.1, final_lr_fraction=0.1),
)


def advance(learner, make_groups, until):
    """Train to step `until`, entering stages on the way; every step has its own data."""
    while learner.step < until:
        stage = WARM if learner.step < REINFORCE.first_step else REINFORCE
        if learner.stage != stage:
            learner.enter(stage)
        demonstration = learner.stage.name == "warm_start"
        groups = make_groups(2, 3, seed=learner.step, demonstration=demonstration)
        batch = learner.score(pack(groups, max_tokens=60, num_updates=learner.stage.algo.updates_per_batch))
        if not demonstration:
            batch = add_advantages(batch, group_mean, {})
        for index in range(batch.num_updates):
            learner.apply(learner.backward(batch, index), Verdict())
    return learner


def bits(learner):
    optimizer = learner.optimizer
    tensors = {f"weight/{name}": parameter.detach() for name, parameter in learner.parameters().items()}
    tensors |= {f"master/{name}": master for name, master in optimizer.masters.items()}
    tensors |= {f"{kind}/{name}": t for kind, ts in optimizer.moments().items() for name, t in ts.items()}
    tensors |= {f"reference/{name}": t for name, t in (learner.reference or {}).items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    different = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert not different


@pytest.mark.parametrize(("preset", "dtype"), [("gpt_oss", "float32"), ("gpt_oss", "bfloat16"), ("qwen3", "float32")])
@pytest.mark.parametrize("at", [1, 2, 4])
def test_resumed_is_undisturbed_to_the_bit(tiny_checkpoint, make_groups, tmp_path, preset, dtype, at):
    """Saved in the warm start, between the stages, in the midst of reinforcement."""
    config = ModelConfig(path=tiny_checkpoint(preset, num_hidden_layers=2), dtype=dtype)
    undisturbed = advance(Learner(config, LearnerConfig()), make_groups, at)
    undisturbed.save(tmp_path / "c", {"collector": [1, "two"], "x": 0.1})
    expected_draw = torch.rand(3)
    advance(undisturbed, make_groups, 6)

    torch.manual_seed(99)
    resumed = Learner(config, LearnerConfig(), seed=5)
    assert resumed.load(tmp_path / "c") == {"collector": [1, "two"], "x": 0.1}
    assert torch.equal(torch.rand(3), expected_draw)
    assert resumed.step == at
    resumed.enter(WARM if at < REINFORCE.first_step else REINFORCE)  # as a resumed run does
    advance(resumed, make_groups, 6)
    assert_same(bits(resumed), bits(undisturbed))
    assert (resumed.step, resumed.version) == (undisturbed.step, undisturbed.version) == (6, 2 + 4 * 2)


def test_another_process_gets_the_same_bits(tiny_checkpoint, make_groups, tmp_path):
    config = ModelConfig(path=tiny_checkpoint("gpt_oss", num_hidden_layers=2))
    learner = advance(Learner(config, LearnerConfig()), make_groups, 3)
    learner.save(tmp_path / "three", {})
    advance(learner, make_groups, 4).save(tmp_path / "here", {})
    here = Path(__file__)
    program = f"""
import sys
sys.path[:0] = [{str(here.parent)!r}, {str(here.parent.parent)!r}]
import torch
torch.set_num_threads({torch.get_num_threads()})
from conftest import synthetic_groups
from test_learner_resume import Learner, LearnerConfig, ModelConfig, advance
learner = Learner(ModelConfig(path={config.path!r}), LearnerConfig())
learner.load({str(tmp_path / "three")!r})
advance(learner, synthetic_groups, 4).save({str(tmp_path / "there")!r}, {{}})
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=here.parent.parent.parent, timeout=200)
    files = [load_file(tmp_path / name / "learner.safetensors") for name in ("here", "there")]
    assert_same(*files)


def test_a_checkpoint_holds_an_ordinary_model(tmp_path, make_groups):
    """Weights and tokenizer load with plain `transformers`; `export` and `weights_to` write the same weights."""
    tokenizer = build_tiny_tokenizer(["one two three"], 270)
    build_tiny_model("qwen3", tmp_path / "model", tokenizer=tokenizer, num_hidden_layers=2)
    learner = Learner(ModelConfig(path=str(tmp_path / "model")), LearnerConfig())
    learner.save(tmp_path / "000000", {})
    learner.export(tmp_path / "exported")
    learner.weights_to(WeightSource("file", str(tmp_path / "sent")))
    for path in (tmp_path / "000000" / "weights", tmp_path / "exported"):
        plain = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        assert AutoTokenizer.from_pretrained(path).get_vocab() == tokenizer.get_vocab()
        for name, parameter in plain.named_parameters():
            assert torch.equal(parameter, learner.parameters()[name])
    sent = load_file(tmp_path / "sent" / "weights.safetensors")
    assert sent.keys() == learner.parameters().keys()
    assert all(torch.equal(tensor, learner.parameters()[name]) for name, tensor in sent.items())


def test_entering_the_same_stage_again_keeps_everything(tiny_checkpoint, make_groups):
    """And entering the next one keeps the weights, forgets the moments and freezes a reference."""
    learner = advance(
        Learner(ModelConfig(path=tiny_checkpoint("gpt_oss", num_hidden_layers=2)), LearnerConfig()), make_groups, 3
    )
    before = bits(learner)
    learner.enter(REINFORCE)
    assert_same(bits(learner), before)
    learner.enter(dataclasses.replace(REINFORCE, optim=OptimConfig(lr=1e-5)))  # other options of the same stage
    assert_same(bits(learner), before)
    learner.enter(Stage("reinforcement", 3, 9, REINFORCE.algo, REINFORCE.optim))
    assert learner.optimizer.moments() == {}
    assert_same(learner.reference, {name: p.detach() for name, p in learner.parameters().items()})


def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(tiny_checkpoint, tmp_path):
    small = Learner(ModelConfig(path=tiny_checkpoint("gpt_oss", num_hidden_layers=2)), LearnerConfig())
    small.save(tmp_path / "small", {})
    other = Learner(ModelConfig(path=tiny_checkpoint("qwen3", num_hidden_layers=2)), LearnerConfig())
    before = bits(other)
    with pytest.raises(CheckpointError, match="of another model"):
        other.load(tmp_path / "small")
    assert_same(bits(other), before)
    assert latest_checkpoint(tmp_path) == tmp_path / "small"
