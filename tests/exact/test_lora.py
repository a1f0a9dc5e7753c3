"""A learner with an adapter: on-policy to the bit, its base untouched and its reference, resumed without a trace."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from safetensors.torch import load_file

from keel.algo.advantage import group_mean
from keel.algo.apply import add_advantages
from keel.batch import pack
from keel.config import AlgoConfig, EngineConfig, KLConfig, LearnerConfig, LoraConfig, ModelConfig, OptimConfig, Stage
from keel.engines.embedded.engine import EmbeddedEngine
from keel.engines.process import EngineProcess
from keel.learner.checkpoint import CheckpointError
from keel.learner.group import LearnerGroup
from keel.learner.learner import Learner
from keel.models.adapter_files import AdapterError
from keel.models.policy import PolicyModel
from keel.sync.publish import publish
from keel.types import Verdict

PRESETS = ("gpt_oss", "qwen3", "qwen3_moe")
LORA = LoraConfig(rank=4, alpha=8)
# Adam's epsilon as in the test of ranks: an element whose gradient is rounding noise must not move by a whole lr.
OPTIM = OptimConfig(lr=3e-2, eps=1e-5, weight_decay=0.1, schedule="cosine")
STAGE = Stage("reinforcement", 0, 6, AlgoConfig(kl=KLConfig(coefficient=0.1), updates_per_batch=2), OPTIM)
ONE_UPDATE = Stage("reinforcement", 0, 6, AlgoConfig(), OPTIM)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    def section(preset, **options):
        return ModelConfig(path=tiny_checkpoint(preset, num_hidden_layers=2), **{"lora": LORA, **options})

    return section


def advance(learner, make_groups, until, stage=STAGE):
    """Train to step `until`; returns the updates, and the last batch."""
    updates, batch = [], None
    while learner.step < until:
        learner.enter(stage)
        groups = make_groups(3, 3, seed=learner.step)
        batch = learner.score(pack(groups, max_tokens=60, num_updates=stage.algo.updates_per_batch))
        batch = add_advantages(batch, group_mean, {})
        for index in range(batch.num_updates):
            updates.append(learner.backward(batch, index))
            learner.apply(updates[-1], Verdict())
    return updates, batch


def bits(learner):
    optimizer = learner.optimizer
    tensors = {f"weight/{name}": parameter.detach() for name, parameter in learner.parameters().items()}
    tensors |= {f"master/{name}": master for name, master in optimizer.masters.items()}
    tensors |= {f"{kind}/{name}": t for kind, ts in optimizer.moments().items() for name, t in ts.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("dtype", "checkpointing"), [("float32", False), ("bfloat16", True)])
def test_on_policy_is_exact_and_the_base_never_moves(model, make_groups, preset, dtype, checkpointing):
    config = model(preset, dtype=dtype, gradient_checkpointing=checkpointing)
    learner = Learner(config, LearnerConfig())
    frozen = {
        name: p.clone() for name, p in learner.policy.model.named_parameters() if name not in learner.parameters()
    }
    updates, _ = advance(learner, make_groups, 3, ONE_UPDATE)
    for update in updates:
        assert update.metrics["policy/ratio_max_dev"] == 0.0
        assert update.metrics["policy/recompute_max_dev"] == 0.0
        assert update.grad_norm > 0.0
    now = dict(learner.policy.model.named_parameters())
    assert_same({name: now[name].detach() for name in frozen}, frozen)
    assert all("lora_" in name for name in learner.optimizer.masters)
    assert all(master.dtype == torch.float32 for master in learner.optimizer.masters.values())
    moved = [name for name, parameter in learner.parameters().items() if "lora_B" in name and parameter.any()]
    assert len(moved) == sum("lora_B" in name for name in learner.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_the_reference_is_the_base_to_the_bit_and_no_copy_of_it(model, make_groups, preset):
    learner = Learner(model(preset), LearnerConfig(replay_routes="off"))  # the groups' routes are made up
    _, batch = advance(learner, make_groups, 2)
    assert learner.reference is None
    base = PolicyModel.load(learner.config.path)
    batch = learner.score(batch)
    for micro_batch in batch.micro_batches:
        with torch.no_grad():
            assert torch.equal(micro_batch.ref_logprobs, base(micro_batch, with_entropy=False).logprobs)
        assert not torch.equal(micro_batch.ref_logprobs, micro_batch.old_logprobs)


@pytest.mark.parametrize(("preset", "dtype"), [("gpt_oss", "bfloat16"), ("qwen3_moe", "float32"), ("qwen3", "float32")])
def test_resumed_is_undisturbed_to_the_bit(model, make_groups, tmp_path, preset, dtype):
    config = model(preset, dtype=dtype)
    undisturbed = Learner(config, LearnerConfig())
    advance(undisturbed, make_groups, 2)
    undisturbed.save(tmp_path / "c", {"x": 1})
    advance(undisturbed, make_groups, 4)
    resumed = Learner(config, LearnerConfig(), seed=5)
    assert resumed.load(tmp_path / "c") == {"x": 1}
    advance(resumed, make_groups, 4)
    assert_same(bits(resumed), bits(undisturbed))


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(model, make_groups, tmp_path):
    learner = Learner(model("gpt_oss"), LearnerConfig())
    _, batch = advance(learner, make_groups, 1)
    learner.save(tmp_path / "c", {})
    stored = load_file(tmp_path / "c" / "learner.safetensors")
    assert {name for name in stored if not name.startswith("random/")} == {
        f"{kind}/{name}" for kind in ("master", "exp_avg", "exp_avg_sq") for name in learner.parameters()
    }
    adapter = sum(parameter.numel() for parameter in learner.parameters().values())
    written = sum(file.stat().st_size for file in (tmp_path / "c").rglob("*") if file.is_file())
    assert written < 4 * 4 * adapter + 200_000  # masters, two moments, weights; names and random states
    weights = tmp_path / "c" / "weights"
    assert json.loads((weights / "adapter_config.json").read_text())["base_model_name_or_path"] == learner.config.path
    one = batch.micro_batches[0]
    with torch.no_grad():
        assert torch.equal(PolicyModel.load(weights)(one).logprobs, learner.policy(one).logprobs)


def test_an_adapter_can_be_trained_on_but_not_by_accident(model, make_groups, tmp_path):
    learner = Learner(model("qwen3"), LearnerConfig())
    advance(learner, make_groups, 1)
    learner.export(tmp_path)
    with pytest.raises(AdapterError, match=r"holds an adapter of rank 4 on .* and model\.lora\.rank is 0"):
        Learner(ModelConfig(path=str(tmp_path)), LearnerConfig())
    further = Learner(ModelConfig(path=str(tmp_path), lora=LORA), LearnerConfig())
    assert_same(
        {name: p.detach() for name, p in further.parameters().items()},
        {name: p.detach() for name, p in learner.parameters().items()},
    )
    advance(further, make_groups, 1)
    other = Learner(model("qwen3", lora=LoraConfig(rank=3)), LearnerConfig())
    learner.save(tmp_path / "c", {})
    with pytest.raises(CheckpointError, match="of another model"):
        other.load(tmp_path / "c")


def test_an_adapter_is_not_resumed_on_another_base(model, make_groups, tmp_path):
    """One number of the base is another: the same names and shapes, and other log-probs."""
    config = model("qwen3")
    policy = PolicyModel.load(config.path)
    changed = ModelConfig(path=str(tmp_path / "base"), lora=LORA)
    policy.save(changed.path)
    learner = Learner(changed, LearnerConfig())
    learner.save(tmp_path / "c", {})
    assert Learner(changed, LearnerConfig()).load(tmp_path / "c") == {}
    with torch.no_grad():
        policy.model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-3
    policy.save(changed.path)
    with pytest.raises(CheckpointError, match="an adapter of another base than"):
        Learner(changed, LearnerConfig()).load(tmp_path / "c")


def test_two_ranks_equal_one_process(model, make_groups, tmp_path):
    """Frozen and trained parameters in one shard; a checkpoint of two goes on in one."""
    config = model("gpt_oss")
    one = Learner(config, LearnerConfig())
    with LearnerGroup(config, LearnerConfig(ranks=2)) as two:
        expected, found = advance(one, make_groups, 2)[0], advance(two, make_groups, 2)[0]
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
            assert ours.metrics["policy/recompute_max_dev"] == 0.0
            assert ours.metrics["policy/kl"] == pytest.approx(theirs.metrics["policy/kl"], rel=1e-3, abs=1e-6)
        two.save(tmp_path / "by_two", {})
    one.export(tmp_path / "by_one")
    found, expected = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "by_two" / "weights", tmp_path / "by_one")
    )
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4, msg=name)
    resumed = Learner(config, LearnerConfig())
    resumed.load(tmp_path / "by_two")
    advance(resumed, make_groups, 3)


def test_an_engine_in_its_own_process_gets_the_adapter_alone_and_agrees_to_the_bit(model, make_groups):
    config = model("gpt_oss", dtype="bfloat16")
    learner = Learner(config, LearnerConfig())
    advance(learner, make_groups, 2, ONE_UPDATE)
    settings = EngineConfig(slots=8, prefill_tile=32)
    threads = torch.get_num_threads()
    embedded = EmbeddedEngine(learner.policy, settings, max_sequence_tokens=64)
    separate = EngineProcess(config, settings, max_sequence_tokens=64, num_threads=threads)
    tokens = tuple(range(40))
    try:
        before = asyncio.run(separate.score(tokens))
        publish(learner, separate, 7)
        after, expected = asyncio.run(separate.score(tokens)), asyncio.run(embedded.score(tokens))
    finally:
        separate.stop()
    assert after.logprobs == expected.logprobs
    assert after.logprobs != before.logprobs
