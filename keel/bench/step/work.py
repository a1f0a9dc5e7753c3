"""What both trainers are given to do, the same for both: a model whose replies have a forced length, prompts, a reward.

Neither trainer can be told to draw exactly n tokens and then stop, so the model's own weights see to it. Every token
has a place in the reply; its row of the embedding says which place comes next, and rows of the head answer to their
own place. A reply so runs from place 0 to the last, drawing freely among the tokens of each place, and ends: the next
token depends on the last one alone, with any other at odds of e^-25 or less. Attention, experts and head compute all
they would compute otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from keel.models.tiny import build_tiny_model, build_tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 136,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 128,
}
"""4.0 M parameters, pairwise different sizes."""
NUM_PROMPTS, NUM_ATTEMPTS = 8, 8
PROMPT_TOKENS = 64
END = "<|im_end|>"
TOOL_NAME = "look"
CALL = '<tool_call>\n{"name": "look", "arguments": {"place": "shelf"}}\n</tool_call>'
SEEN = "three red books and a lamp"
EMBEDDING_SCALE = 4.0  # against the layers' contributions, of about 1
HEAD_SCALE = 5.0  # odds stay above e^-80: smaller ones are denormal, which no trainer is to be slowed down by


@dataclass(frozen=True)
class Work:
    """One kind of step: `turns` replies of `reply_tokens` each, the last token of a reply included; between two replies
    a tool answers."""

    name: str
    reply_tokens: int
    turns: int = 1

    @property
    def drawn_tokens(self) -> int:
        """Tokens that the policy draws in a step."""
        return NUM_PROMPTS * NUM_ATTEMPTS * self.turns * self.reply_tokens


WORKS = (Work("64 new tokens", 64), Work("256 new tokens", 256), Work("tool, 2 x 64 new tokens", 64, turns=2))


def look(place: str) -> str:
    """Look at a place.

    Args:
        place: where to look
    """
    return f"{place}: {SEEN}"


def reward_of(token_ids: Sequence[int]) -> float:
    """The share of odd ids among everything after the prompt: differs between attempts, and costs nothing."""
    return sum(token % 2 for token in token_ids) / max(1, len(token_ids))


def build(work: Work, path: Path) -> None:
    """Write the model of `work`, its tokenizer, and `prompts.txt` with a prompt to a line, to `path`."""
    tokenizer = _tokenizer()
    model = build_tiny_model("gpt_oss", None, tokenizer=tokenizer, vocab_size=VOCAB_SIZE, **SHAPE)
    prompts = _prompts(tokenizer)
    _count_out(model, tokenizer, work, last_of_prompt=prompt_ids(tokenizer, prompts[0])[-1])
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens that an attempt begins with."""
    messages = [{"role": "user", "content": prompt}]
    found: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return found


# ChatML without a list of tools in the prompt: the two write such a list each in their own way.
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content %}{{- message.content }}{%- endif %}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- set function = call.function if call.function is defined else call %}"
    '{{- \'<tool_call>\\n{"name": "\' + function.name + \'", "arguments": \' + (function.arguments | tojson) }}'
    "{{- '}\\n</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A vocabulary of `VOCAB_SIZE`, learned from made-up words; `CALL` is one token of it."""
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(0, 26, (12_000, 5), generator=generator).tolist()
    words = ["".join(chr(97 + letter) for letter in word) for word in letters]
    lines = [" ".join(words[start : start + 20]) for start in range(0, len(words), 20)]
    tokenizer = build_tiny_tokenizer(lines, VOCAB_SIZE - 1, style="chatml")
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens([CALL])
    if len(tokenizer) != VOCAB_SIZE:
        raise RuntimeError(f"the vocabulary has {len(tokenizer)} tokens, {VOCAB_SIZE} were to be made")
    return tokenizer


def _prompts(tokenizer: Any) -> list[str]:
    """`NUM_PROMPTS` different ones of `PROMPT_TOKENS` tokens each, chat marks included."""
    vocabulary = tokenizer.get_vocab()
    # Whole words after a space: the byte-level spelling of a space is U+0120.
    words = sorted(token[1:] for token in vocabulary if len(token) == 4 and token[0] == "\u0120")
    prompts = []
    for index in range(NUM_PROMPTS):
        chosen: list[str] = []
        while len(prompt_ids(tokenizer, " ".join(chosen))) < PROMPT_TOKENS:
            chosen.append(words[(37 * index + len(chosen)) % len(words)])
        prompts.append(" ".join(chosen))
    return prompts


@torch.no_grad()
def _count_out(model: Any, tokenizer: Any, work: Work, *, last_of_prompt: int) -> None:
    """Set embedding and head so that a reply has `work.reply_tokens` tokens, the last of them `END`."""
    end, call = tokenizer.convert_tokens_to_ids(END), tokenizer.convert_tokens_to_ids(CALL)
    ending = [call, end] if work.turns > 1 else [end]
    num_free = work.reply_tokens - len(ending)
    kept_out = {last_of_prompt, *tokenizer.get_added_vocab().values()}
    free = [token for token in range(VOCAB_SIZE) if token not in kept_out]
    place = {token: index % num_free for index, token in enumerate(free)}
    place |= {token: num_free + index for index, token in enumerate(ending)}
    generator = torch.Generator().manual_seed(1)
    hidden = SHAPE["hidden_size"]
    codes = torch.nn.functional.normalize(torch.randn(work.reply_tokens + 1, hidden, generator=generator), dim=1)
    own = torch.nn.functional.normalize(torch.randn(VOCAB_SIZE, hidden, generator=generator), dim=1)
    head = torch.randn(VOCAB_SIZE, hidden, generator=generator) / math.sqrt(hidden)
    embedding = own.clone()
    for token, at in place.items():
        embedding[token] += codes[at + 1]  # what comes next
        head[token] += HEAD_SCALE * codes[at]  # where it may stand itself
    embedding[last_of_prompt] += codes[0]
    model.get_input_embeddings().weight.copy_(EMBEDDING_SCALE * math.sqrt(hidden / 2) * embedding)
    model.get_output_embeddings().weight.copy_(head)
