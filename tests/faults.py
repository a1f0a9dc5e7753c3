"""What plain `transformers` says of drawn tokens, whole or with a fault of its own making, and episodes to ask about.

Nothing here is Keel's but the tiny model's sizes: the reference is eager attention and eager experts on a module whose
configuration, parameters or input were changed by hand.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from keel.batch import MicroBatch
from keel.config import EngineConfig, ModelConfig
from keel.engines.base import Engine, GenerateRequest, GenerateResult
from keel.engines.embedded.engine import EmbeddedEngine
from keel.engines.embedded.load import load_policy
from keel.models.tiny import build_tiny_model, build_tiny_tokenizer
from keel.types import SamplingSettings

VOCAB = 391
CAPACITY = 160
TEXTS = ["the quick brown fox jumps over the lazy dog " * 4, "hello world, hello there"] * 20


@dataclass(frozen=True)
class Asked:
    """A prompt and what was drawn after it."""

    prompt: tuple[int, ...]
    drawn: tuple[int, ...]
    temperature: float = 1.0

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.drawn


def model_directory(path: Path, preset: str, *, seed: int = 3) -> Path:
    tokenizer = build_tiny_tokenizer(TEXTS, 320)
    build_tiny_model(preset, path, tokenizer=tokenizer, vocab_size=VOCAB, seed=seed)
    return path


def prompt_of(length: int, seed: int = 1) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(256) for _ in range(length))


def make_engine(path: Path) -> EmbeddedEngine:
    """Weights of its own, from any directory."""
    policy = load_policy(ModelConfig(path=str(path)), "cpu")
    return EmbeddedEngine(policy, EngineConfig(slots=4), max_sequence_tokens=CAPACITY, shares_weights=False)


def request_of(
    prompt: Sequence[int], *, temperature: float = 1.0, top_p: float = 1.0, count: int = 40, **fields: Any
) -> GenerateRequest:
    sampling = SamplingSettings(temperature, top_p)
    request = GenerateRequest("a", "session", tuple(prompt), sampling, count, (), 5, return_routes=True)
    return replace(request, **fields)


async def draw(engine: Engine, request: GenerateRequest, *, close: bool = True) -> GenerateResult:
    result = await engine.generate(request)
    if close:
        await engine.close()
    assert result.error is None
    return result


def reported(result: GenerateResult) -> torch.Tensor:
    return torch.tensor([value for span in result.spans for value in span.logprobs])


def plain(
    path: Path, *, configure: Callable[[Any], None] | None = None, change: Callable[[Any], None] | None = None
) -> Any:
    """A plain model: `configure` changes its configuration before it is built, `change` the module afterwards."""
    config = AutoConfig.from_pretrained(path)
    if configure is not None:
        configure(config)
    moe = {"experts_implementation": "eager"} if config.model_type != "qwen3" else {}
    attention = "eager" if config.model_type == "gpt_oss" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.float32, attn_implementation=attention, **moe
    ).eval()
    if change is not None:
        with torch.no_grad():
            change(model)
    return model


@torch.no_grad()
def plain_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """`[n, V]` after each token of a sequence that is run alone, without a cache."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits


def logprobs_of(logits: torch.Tensor, drawn: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Of `drawn`, which the last rows but one of `logits` (of prompt and drawn) are about."""
    rows = logits[-len(drawn) - 1 : -1] / temperature
    return torch.log_softmax(rows, dim=-1).gather(1, torch.tensor(drawn)[:, None])[:, 0]


def plain_logprobs(model: Any, asked: Asked) -> torch.Tensor:
    return logprobs_of(plain_logits(model, asked.tokens), asked.drawn, asked.temperature)


def micro_batch_of(asked: Sequence[Asked]) -> MicroBatch:
    """All sequences packed in one row, a single reply in each."""
    streams: dict[str, list[torch.Tensor]] = {}
    for each in asked:
        tokens = torch.tensor(each.tokens)
        drawn = torch.arange(1, len(tokens)) >= len(each.prompt)
        rows = {
            "input_ids": tokens[:-1],
            "positions": torch.arange(len(tokens) - 1),
            "labels": tokens[1:],
            "loss_mask": drawn,
            "policy_version": torch.where(drawn, 0, -1).int(),
            "temperature": torch.where(drawn, each.temperature, 1.0),
            "turn": torch.where(drawn, 0, -1).int(),
        }
        for name, stream in rows.items():
            streams.setdefault(name, []).append(stream)
    ends = torch.tensor([0, *(len(each.tokens) - 1 for each in asked)]).cumsum(0).int()
    return MicroBatch(
        cu_seqlens=ends,
        sequence_to_trajectory=torch.arange(len(asked)),
        max_seqlen=max(len(each.tokens) - 1 for each in asked),
        **{name: torch.cat(parts) for name, parts in streams.items()},
    )
