"""A tiny GPT-OSS trained with TRL's GRPOTrainer on sink attention, on a CPU: `python examples/trl_sinks.py`.

Needs `pip install keel[trl]`. With a real checkpoint the lines marked (1) to (3) are all there is to it: register,
load with `attn_implementation="keel"`, and look at what every layer uses before a long run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

import keel.attention
from keel.models.tiny import build_tiny_model, build_tiny_tokenizer

PROMPTS = ["Write vowels:", "Say something with many vowels, please:", "aeiou", "And again:"]
VOWELS = "aeiouAEIOU"


def vowels(completions: list[str], **_: Any) -> list[float]:
    """The share of vowels in each completion: something that even a random model can raise."""
    return [sum(letter in VOWELS for letter in text) / max(1, len(text)) for text in completions]


def make_model(path: Path) -> None:
    """A GPT-OSS of some 100,000 parameters with sinks and sliding windows, and its tokenizer."""
    texts = [*PROMPTS, "the quick brown fox jumps over the lazy dog", "0123456789"]
    tokenizer = build_tiny_tokenizer(texts, style="chatml", vocab_size=300)
    build_tiny_model("gpt_oss", path, tokenizer=tokenizer, seed=0)


def train(steps: int, directory: Path) -> GRPOTrainer:
    """Train the tiny model for `steps` steps and return the trainer; what it writes is put into `directory`."""
    path = directory / "model"
    make_model(path)
    keel.attention.register()  # (1)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="keel")  # (2)
    print(keel.attention.explain(model))  # (3)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    config = GRPOConfig(
        output_dir=str(directory / "out"),
        max_steps=steps,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=12,
        learning_rate=3e-3,
        gradient_checkpointing=True,
        bf16=False,
        use_cpu=True,
        seed=0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=vowels,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 4}),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def main() -> None:
    """Train and print the mean reward of the first and the last steps."""
    parser = argparse.ArgumentParser(description="Train a tiny GPT-OSS with TRL on sink attention.")
    parser.add_argument("--steps", type=int, default=30)
    with tempfile.TemporaryDirectory() as directory:
        trainer = train(parser.parse_args().steps, Path(directory))
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    few = max(1, len(rewards) // 5)
    print(f"mean reward of the first {few} steps: {sum(rewards[:few]) / few:.3f}")
    print(f"mean reward of the last {few} steps: {sum(rewards[-few:]) / few:.3f}")


if __name__ == "__main__":
    main()
