"""TRL's own trainers on "keel" attention: the numbers of a step are those of transformers' eager attention."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import keel.attention
from keel.models import attention

PLAIN = {"use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1, "save_strategy": "no", "seed": 0}
TEXTS = [
    "short",
    "a text of some more words than that",
    "and 1234 one in the middle",
    "x " * 25,
    "q",
    "the last of six",
]


@pytest.fixture(scope="module")
def example():
    """examples/trl_sinks.py as a module."""
    path = Path(__file__).parents[2] / "examples" / "trl_sinks.py"
    spec = importlib.util.spec_from_file_location("trl_sinks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(example, tmp_path_factory):
    """Two layers, windows of the first shorter than the texts; sinks far apart, so that losing one is seen."""
    path = tmp_path_factory.mktemp("model")
    example.make_model(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data = torch.linspace(-3, 5, len(parameter))
    model.config.sliding_window = 7
    model.save_pretrained(path)
    return path


def load(checkpoint, implementation):
    keel.attention.register()
    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation=implementation)


@pytest.fixture
def calls(monkeypatch):
    """What the attention function was given, and nothing changed."""
    seen = []
    plain = attention.keel_attention_forward

    def noted(module, query, key, value, mask, **kwargs):
        told = (
            "packed"
            if kwargs.get("cu_seq_lens_q") is not None
            else "cached"
            if query.shape[2] < key.shape[2]
            else "rows"
        )
        seen.append(told)
        return plain(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(attention, "keel_attention_forward", noted)
    return seen


def steps(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "grad_norm" in entry]


def grpo(checkpoint, implementation, directory):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
    config = GRPOConfig(
        output_dir=str(directory), max_steps=2, per_device_train_batch_size=8, num_generations=4, learning_rate=1e-3,
        max_completion_length=9, gradient_checkpointing=True, beta=0.1, **PLAIN,
    )  # fmt: skip
    return GRPOTrainer(
        model=load(checkpoint, implementation),
        reward_funcs=lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer,
    )


def test_grpo_steps_are_those_of_eager_attention(checkpoint, calls, tmp_path):
    """Left-padded prompts, right-padded replies, generation with a cache, checkpointing, a reference model."""
    mine, eager = (steps(grpo(checkpoint, name, tmp_path / name)) for name in ("keel", "eager"))
    assert {"rows", "cached"} <= set(calls)
    assert len(mine) == len(eager) == 2
    for got, want in zip(mine, eager, strict=True):
        for name in ("reward", "completions/mean_length", "num_tokens"):
            assert got[name] == want[name], name
        for name in ("loss", "grad_norm", "entropy", "kl"):
            assert math.isclose(got[name], want[name], rel_tol=1e-3, abs_tol=1e-5), (name, got[name], want[name])
    assert mine[0]["grad_norm"] > 0


def sft(checkpoint, implementation, directory, **options):
    given = {"max_length": 64, "gradient_checkpointing": False, **options, **PLAIN}
    config = SFTConfig(
        output_dir=str(directory), max_steps=2, per_device_train_batch_size=6, learning_rate=1e-3, **given
    )
    return SFTTrainer(
        model=load(checkpoint, implementation),
        args=config,
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )


@pytest.mark.filterwarnings("ignore:.*attention implementation.*")
@pytest.mark.parametrize("options", [{}, {"padding_free": True, "max_length": None}], ids=["padded", "padding-free"])
def test_sft_steps_are_those_of_eager_attention_over_padded_rows(checkpoint, calls, tmp_path, options):
    mine = steps(sft(checkpoint, "keel", tmp_path / "keel", **options))
    assert set(calls) == {"packed" if options else "rows"}
    eager = steps(sft(checkpoint, "eager", tmp_path / "eager"))
    for got, want in zip(mine, eager, strict=True):
        for name in ("loss", "grad_norm", "num_tokens"):
            assert math.isclose(got[name], want[name], rel_tol=1e-4), (name, got[name], want[name])


@pytest.mark.filterwarnings("ignore:.*attention implementation.*")
def test_sft_rows_packed_by_trl_are_the_rows_alone(checkpoint, calls, tmp_path):
    """All texts fit into a few rows of 64 tokens, so one step over them is one step over the padded rows."""
    mine = steps(sft(checkpoint, "keel", tmp_path / "keel", packing=True, packing_strategy="bfd"))
    assert set(calls) == {"packed"}
    eager = steps(sft(checkpoint, "eager", tmp_path / "eager"))
    assert mine[0]["num_tokens"] == eager[0]["num_tokens"]
    assert math.isclose(mine[0]["loss"], eager[0]["loss"], rel_tol=1e-4)
    assert math.isclose(mine[0]["grad_norm"], eager[0]["grad_norm"], rel_tol=1e-4)


def test_the_example_runs_and_says_what_it_runs_on(example, capsys, tmp_path):
    trainer = example.train(2, tmp_path)
    assert "keel -> cpu (torch's stock CPU flash kernel, chosen automatically" in capsys.readouterr().out
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == 2
    assert all(0 <= reward <= 1 for reward in rewards)
