"""The same steps by TRL's GRPOTrainer, with the options that make it do the same work as fast as it can."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from keel.bench.measure import forget_peak, peak_resident_bytes
from keel.bench.step import work as given
from keel.bench.step.side import Gate, Report
from keel.bench.step.work import NUM_ATTEMPTS, NUM_PROMPTS, Work

NUM_SEQUENCES = NUM_PROMPTS * NUM_ATTEMPTS
LR = 1e-6
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}
"""How `transformers` reads a reply of the template in `work`."""


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer that notes what each part of a step takes; nothing else is changed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.taken: dict[str, float] = {}

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        made = super()._generate(*args, **kwargs)
        self.taken["generate_s"] = time.perf_counter() - begun
        return made

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        made = super()._generate_and_score_completions(*args, **kwargs)
        self.taken["score_s"] = time.perf_counter() - begun - self.taken["generate_s"]
        self.taken["loss_tokens"] = float(made["num_items_in_batch"])
        return made


class _Gated(TrainerCallback):  # type: ignore[misc]
    """Lets the trainer go on when the gate says so. A step ends where the optimizer has stepped."""

    def __init__(self, gate: Gate, before: int) -> None:
        self._gate = gate
        self._before = before
        self.trainer: TimedTrainer | None = None
        self._begun = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._wait({"threads": torch.get_num_threads()}, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        assert self.trainer is not None
        took = time.perf_counter() - self._begun
        taken = self.trainer.taken
        update_s = took - taken["generate_s"] - taken["score_s"]
        extra = peak_resident_bytes() - self._before
        self._wait({**taken, "update_s": update_s, "step_s": took, "updates": 1, "extra_bytes": extra}, control)

    def _wait(self, report: Report, control: Any) -> None:
        control.should_training_stop = not self._gate.wait(report)
        self._begun = time.perf_counter()


def odd_share(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """`work.reward_of`, as TRL calls rewards."""
    return [given.reward_of(ids) for ids in completion_ids]


def options_of(work: Work, output: Path, *, rows: int) -> GRPOConfig:
    """Everything that TRL does and Keel does not is off, and so is what would only slow it down here.

    `rows` sequences go through the model at once.
    """
    between = 0 if work.turns == 1 else given.PROMPT_TOKENS
    return GRPOConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=NUM_SEQUENCES // rows,
        num_generations=NUM_ATTEMPTS,
        max_completion_length=work.turns * work.reply_tokens + between,
        max_tool_calling_iterations=work.turns - 1,
        max_steps=10_000,
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta2=0.999,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.0,
        num_iterations=1,
        scale_rewards="none",
        loss_type="dapo",
        router_aux_loss_coef=0.0,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def make_trainer(work: Work, model: Path, options: GRPOConfig, *, experts: str, **also: Any) -> TimedTrainer:
    """A trainer on the model in `model`, whose experts run as `experts` says."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.response_template = RESPONSE
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, experts_implementation=experts)
    prompts = (model / "prompts.txt").read_text(encoding="utf-8").splitlines()
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
    arguments: Mapping[str, Any] = {
        "model": policy,
        "args": options,
        "processing_class": tokenizer,
        "train_dataset": Dataset.from_list(rows),
        "reward_funcs": odd_share,
        "tools": [given.look] if work.turns > 1 else None,
    }
    return TimedTrainer(**{**arguments, **also})


def run_trl(gate: Gate, *, work: Work, model: str, output: str, threads: int, rows: int, experts: str) -> None:
    """Steps as `gate` asks for them, each reported as `Split` has it."""
    torch.set_num_threads(threads)
    gated = _Gated(gate, forget_peak())
    options = options_of(work, Path(output), rows=rows)
    gated.trainer = make_trainer(work, Path(model), options, experts=experts, callbacks=[gated])
    gated.trainer.train()
