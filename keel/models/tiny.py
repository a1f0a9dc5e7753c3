"""Small models and tokenizers, made here: the same classes and checkpoints as the real ones, in a few megabytes.

Within a preset, hidden, intermediate, heads x head size, number of experts and number of layers differ pairwise: with
equal sizes a transposed weight goes unnoticed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch

from keel.models.progress import no_progress_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Preset = Literal["gpt_oss", "qwen3", "qwen3_moe"]

HARMONY_SPECIAL_TOKENS: tuple[str, ...] = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
CHATML_SPECIAL_TOKENS: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHATML_TEMPLATE = (
    "{%- if tools %}"
    "{{- '<|im_start|>system\\n' }}"
    "{%- if messages and messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}"
    "{{- 'Tools:' }}"
    "{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if not (tools and loop.first and message.role == 'system') %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content %}{{- message.content }}{%- endif %}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- set function = call.function if call.function is defined else call %}"
    "{{- '<tool_call>' + ({'name': function.name, 'arguments': function.arguments} | tojson) + '</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

# As openai/gpt-oss-20b configures it; only the sizes of the presets are small.
_GPT_OSS_ROPE: Mapping[str, Any] = MappingProxyType(
    {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
)

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "gpt_oss": MappingProxyType(
            {
                "model_type": "gpt_oss",
                "hidden_size": 128,
                "intermediate_size": 112,
                "num_hidden_layers": 4,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "num_local_experts": 6,
                "num_experts_per_tok": 2,
                "sliding_window": 32,
                "max_position_embeddings": 131072,
                "rope_parameters": dict(_GPT_OSS_ROPE),
                "attention_bias": True,
                "tie_word_embeddings": False,
            }
        ),
        "qwen3": MappingProxyType(
            {
                "model_type": "qwen3",
                "hidden_size": 96,
                "intermediate_size": 208,
                "num_hidden_layers": 3,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "max_position_embeddings": 40960,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
                "tie_word_embeddings": True,
            }
        ),
        "qwen3_moe": MappingProxyType(
            {
                "model_type": "qwen3_moe",
                "hidden_size": 80,
                "intermediate_size": 176,
                "moe_intermediate_size": 56,
                "num_hidden_layers": 4,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "head_dim": 24,
                "num_experts": 8,
                "num_experts_per_tok": 3,
                "norm_topk_prob": True,
                "mlp_only_layers": [1],
                "max_position_embeddings": 40960,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
                "tie_word_embeddings": False,
            }
        ),
    }
)

SINK_MEAN = 0.5
SINK_STD = 0.5
BIAS_STD = 0.02
# Residual branches write with this projection; scaled down with depth so that the stream keeps its size.
_RESIDUAL_OUT = re.compile(r"(o_proj|down_proj)(\.weight)?$")
_EXPERT_MATRIX = re.compile(r"experts\.(gate_up_proj|down_proj)$")
_BIAS = re.compile(r"bias$")
# Scores start out flat, or the first hundred steps go into unlearning chance attention before copying is learned.
_SCORE = re.compile(r"[qk]_proj\.weight$")
SCORE_GAIN = 0.45
_NORM = re.compile(r"norm\.weight$")


def build_tiny_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 400,
    *,
    style: Literal["harmony", "chatml"] = "harmony",
    across_words: bool = False,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`, every digit its own token, special tokens last.

    `style` "harmony" has GPT-OSS's special tokens under their own names; "chatml" has `<|im_start|>`, `<|im_end|>`
    and a chat template. `across_words` lets a token span several words, so that texts which always return cost next to
    nothing. Any text can be encoded: the 256 bytes are always there. The vocabulary can end up smaller
    than `vocab_size` if `texts` repeat too little to merge. Raises ValueError if `vocab_size` has no room for bytes
    and special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = HARMONY_SPECIAL_TOKENS if style == "harmony" else CHATML_SPECIAL_TOKENS
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size: got {vocab_size}; 256 bytes and {len(special)} special tokens need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_words),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(special))
    named = (
        {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
        if style == "harmony"
        else {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)
    if style == "chatml":
        fast.chat_template = CHATML_TEMPLATE
    return fast


def tiny_config(preset: Preset, *, vocab_size: int, **overrides: Any) -> Any:
    """The `transformers` configuration of `preset`, with `overrides` of any of its fields.

    Raises ValueError for an unknown preset or a field the configuration does not have.
    """
    from transformers import AutoConfig

    if preset not in PRESETS:
        raise ValueError(f"preset: got {preset!r}; known: {', '.join(PRESETS)}")
    options = dict(PRESETS[preset])
    model_type = options.pop("model_type")
    default = AutoConfig.for_model(model_type)
    # Some fields (Qwen3-MoE's head_dim) are known to the model and not to its default configuration.
    unknown = sorted(set(overrides) - set(vars(default)) - set(default.attribute_map) - set(options))
    if unknown:
        raise ValueError(f"{preset}: no field {', '.join(unknown)} in its configuration; fix the name of the override")
    return AutoConfig.for_model(model_type, **{**options, "vocab_size": vocab_size, **overrides})


def build_tiny_model(
    preset: Preset,
    path: str | Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """A freshly initialized float32 model of `preset`; written to `path`, tokenizer included, if one is given.

    The vocabulary is the tokenizer's, or `vocab_size`. `overrides` set any field of the configuration
    (`num_hidden_layers=2`). The same seed gives the same bits on any number of threads. Raises ValueError if
    neither tokenizer nor vocab_size is given, and whatever `tiny_config` raises.
    """
    from transformers import AutoModelForCausalLM

    if tokenizer is not None:
        vocab_size = vocab_size or len(tokenizer)
        overrides = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **overrides,
        }
    if vocab_size is None:
        raise ValueError("build_tiny_model: got neither tokenizer nor vocab_size; give one")
    config = tiny_config(preset, vocab_size=vocab_size, **overrides)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    initialize(model, seed=seed)
    if path is not None:
        with no_progress_bars():
            model.save_pretrained(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
    return model


@torch.no_grad()
def initialize(model: torch.nn.Module, *, seed: int) -> None:
    """Draw every parameter anew: normal with standard deviation 1 / sqrt(fan-in), in the order of their names.

    `transformers`' one `initializer_range` (0.02) suits a hidden size of thousands; at 128 the logits, the attention
    scores and the router start out flat and the first hundred steps go into growing them. Projections that write to
    the residual stream are smaller by sqrt(2 x layers) (GPT-2), sinks are far from zero and biases are non-zero, so
    that a path which drops either is seen at once.
    """
    generator = torch.Generator().manual_seed(seed)
    num_layers = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    transposed = getattr(model.config, "model_type", "") == "gpt_oss"
    for name, parameter in sorted(model.named_parameters()):
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.copy_(drawn.mul_(_std(name, parameter, num_layers, transposed)))
        if _NORM.search(name):
            parameter.fill_(1.0)
        elif name.endswith("sinks"):
            parameter.add_(SINK_MEAN)


def _std(name: str, parameter: torch.Tensor, num_layers: int, transposed: bool) -> float:
    """Standard deviation of the parameter called `name`; `transposed` experts are [E, in, out]."""
    if name.endswith("sinks"):
        return SINK_STD
    if _BIAS.search(name) or parameter.dim() == 1:
        return BIAS_STD
    if "embed_tokens" in name:
        return 1.0 / math.sqrt(parameter.shape[1])
    fan_in = parameter.shape[1] if transposed and _EXPERT_MATRIX.search(name) else parameter.shape[-1]
    std = 1.0 / math.sqrt(fan_in)
    if _SCORE.search(name):
        return SCORE_GAIN * std
    return std / math.sqrt(2 * num_layers) if _RESIDUAL_OUT.search(name) else std
