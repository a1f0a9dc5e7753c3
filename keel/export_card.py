"""The model card of an export: what the run measured, in words and figures of its own files.

Everything a run says is foreign here: names, tasks' environments, models. It is written as character references, so
that none of it can become a heading, a link, a tag or a line of the card's header.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import keel
from keel.config import TrainConfig
from keel.export_push import HUB_ID
from keel.monitor.bands import bands
from keel.monitor.printable import one_line
from keel.report import invariants
from keel.report.plain import number
from keel.report.source import step_rows
from keel.runs import Run
from keel.secrecy import scrubbed

MAX_TEXT = 200
_PLAIN = re.compile(r"[A-Za-z0-9 ,]")

LOADING = {
    "weights": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```""",
    "adapter": """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(".")  # loads its base too
tokenizer = AutoTokenizer.from_pretrained(".")
```""",
}
WHAT = {
    "weights": "The weights of a policy trained by reinforcement learning with Keel.",
    "adapter": "A LoRA adapter trained by reinforcement learning with Keel, in PEFT's format.",
    "merged": "A policy trained by reinforcement learning with Keel: its base with the LoRA adapter merged into it.",
}


def model_card(run: Run, train_step: int, kind: Literal["weights", "adapter", "merged"], base: str) -> str:
    """README.md of the checkpoint after `train_step` steps of `run`; `base` is the model of an adapter."""
    from huggingface_hub import ModelCard, ModelCardData

    config = run.config
    started_from = base if kind != "weights" else config.model.path
    data = ModelCardData(
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        base_model=started_from if HUB_ID.fullmatch(started_from) else None,
        tags=["keel", "reinforcement-learning", *(["lora"] if kind != "weights" else [])],
    )
    parts = [
        f"# {as_text(config.name)}",
        WHAT[kind],
        _table(_facts(run, config, train_step, started_from)),
        "## Held-out success",
        _evaluations(run, train_step),
        "## Invariants held",
        _invariants(run, config, train_step),
        "## Loading",
        LOADING["adapter" if kind == "adapter" else "weights"],
        "The generation config samples as the run's episodes were sampled, and stops where their replies stopped.",
    ]
    body = "\n\n".join(parts)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def as_text(text: Any) -> str:
    """Foreign text as text on one line: all but letters, digits, spaces and commas as character references."""
    shown = one_line(scrubbed(str(text)), limit=MAX_TEXT)
    return "".join(char if _PLAIN.fullmatch(char) else f"&#{ord(char)};" for char in shown)


def _facts(run: Run, config: TrainConfig, train_step: int, started_from: str) -> list[tuple[str, str]]:
    packages = run.environment.get("packages")
    version = packages.get("keel-rl") if isinstance(packages, dict) else None
    model = "a directory of the machine it was trained on"
    if HUB_ID.fullmatch(started_from):
        model = as_text(started_from)
    elif config.model.tiny.preset:
        model = f"a small random model of the shape {as_text(config.model.tiny.preset)}, made for the run"
    facts = [
        ("started from", model),
        ("environment", as_text(config.env.id)),
        ("training steps", f"{train_step}"),
        ("of them supervised", f"{min(train_step, config.warm_start.steps)}"),
        ("seed", f"{config.seed}"),
        ("Keel", as_text(version or keel.__version__)),
    ]
    if config.model.lora.rank:
        facts.append(("adapter", f"rank {config.model.lora.rank}, alpha {config.model.lora.alpha}"))
    return facts


def _evaluations(run: Run, train_step: int) -> str:
    rows = []
    for row in run.evaluations:
        at = number(row.get("train_step"))
        shares = [number(row.get(name)) for name in ("success", "success_low", "success_high")]
        if at is None or at > train_step or any(share is None for share in shares):
            continue
        success, low, high = (f"{100 * share:.1f} %" for share in shares if share is not None)
        tasks = number(row.get("num_tasks"))
        rows.append((f"{as_text(row.get('name'))}, after {at} steps", f"{success} ({low} to {high}, {tasks} tasks)"))
    if not rows:
        return "The run measured none up to this checkpoint."
    return _table(rows) + "\n\nIn brackets: the 95 % interval."


def _invariants(run: Run, config: TrainConfig, train_step: int) -> str:
    rows = [row for row in step_rows(run) if row["train_step"] <= train_step]
    held = invariants.from_rows(rows, bands(config), updates_per_batch=config.algo.updates_per_batch)
    if not held:
        return "The run's rows speak of none."
    return _table([(each["text"], f"{each['held']} of {each['of']} steps") for each in held])


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])
