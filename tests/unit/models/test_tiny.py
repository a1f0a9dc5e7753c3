"""Tiny models and tokenizers: ordinary checkpoints, sizes that differ, bits that depend on the seed alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keel.models.tiny import (
    CHATML_SPECIAL_TOKENS,
    HARMONY_SPECIAL_TOKENS,
    PRESETS,
    build_tiny_model,
    build_tiny_tokenizer,
    tiny_config,
)

TEXTS = ["What is 12 + 345 - 6? The sum is 351."] * 20


@pytest.mark.parametrize("preset", PRESETS)
def test_sizes_differ_pairwise(preset):
    config = tiny_config(preset, vocab_size=400)
    sizes = [
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads * config.head_dim,
        config.num_hidden_layers,
        config.num_key_value_heads * config.head_dim,
        getattr(config, "moe_intermediate_size", -1),
        getattr(config, "num_experts", getattr(config, "num_local_experts", -2)),
    ]
    assert all(first != second for first, second in itertools.combinations(sizes, 2)), sizes


def test_gpt_oss_is_shaped_as_the_real_one():
    model = build_tiny_model("gpt_oss", vocab_size=400)
    config = model.config
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["beta_fast"], rope["truncate"]) == ("yarn", 32.0, 32.0, False)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name.endswith(("sinks", "bias")):
            assert parameter.abs().min() > 0, f"{name}: a zero hides a path that drops it"
    assert sum(name.endswith("experts.down_proj_bias") for name in parameters) == 4
    assert parameters["model.layers.0.self_attn.sinks"].abs().max() > 0.1


@pytest.mark.parametrize("preset", PRESETS)
def test_a_written_model_is_an_ordinary_checkpoint(tmp_path, preset):
    style = "harmony" if preset == "gpt_oss" else "chatml"
    tokenizer = build_tiny_tokenizer(TEXTS, 300, style=style)
    model = build_tiny_model(preset, tmp_path, tokenizer=tokenizer, seed=4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("12 + 3<|endoftext|>").input_ids == tokenizer("12 + 3<|endoftext|>").input_ids
    assert loaded.config.vocab_size == len(tokenizer) == len(again)
    assert loaded.config.eos_token_id == tokenizer.eos_token_id
    state, written = model.state_dict(), loaded.state_dict()
    assert state.keys() == written.keys()
    assert all(torch.equal(state[name], written[name]) for name in state)


def test_bits_depend_on_the_seed_and_on_nothing_else():
    first = build_tiny_model("gpt_oss", vocab_size=300, seed=1).state_dict()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = build_tiny_model("gpt_oss", vocab_size=300, seed=1).state_dict()
    assert torch.equal(before, torch.get_rng_state()), "the caller's random state must not move"
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_tiny_model("gpt_oss", vocab_size=300, seed=2).state_dict()
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_overrides_set_any_size_and_unknown_ones_are_refused():
    config = build_tiny_model("gpt_oss", vocab_size=300, num_hidden_layers=2, num_local_experts=3, num_experts=5).config
    assert (config.num_hidden_layers, config.num_local_experts) == (2, 5)
    with pytest.raises(ValueError, match="no field hiden_size"):
        build_tiny_model("qwen3", vocab_size=300, hiden_size=64)
    with pytest.raises(ValueError, match="known: gpt_oss, qwen3, qwen3_moe"):
        build_tiny_model("llama", vocab_size=300)
    with pytest.raises(ValueError, match="neither tokenizer nor vocab_size"):
        build_tiny_model("qwen3")


def test_a_fresh_model_starts_near_the_uniform_distribution():
    """Logits of standard deviation about 1: the first loss is near log V, neither flat nor far off."""
    model = build_tiny_model("gpt_oss", vocab_size=300)
    ids = torch.randint(0, 300, (4, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert 0.5 < logits.std() < 2.0


def test_tokenizer_keeps_any_text_and_splits_digits():
    tokenizer = build_tiny_tokenizer(["777"] * 50 + TEXTS, 300)
    text = "naïve 1234 ∑ \n\t 🙂 sum"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = tokenizer.convert_ids_to_tokens(tokenizer.encode("7773451"))
    assert digits == list("7773451"), "digits seen together often must still not merge"
    assert len(tokenizer.encode("The sum is")) < len("The sum is"), "nothing was merged"


def test_tokens_across_words_shorten_what_always_returns_and_still_split_digits():
    plain, across = (build_tiny_tokenizer(TEXTS, 320, across_words=across) for across in (False, True))
    assert len(across.encode(TEXTS[0])) < len(plain.encode(TEXTS[0]))
    assert across.decode(across.encode(TEXTS[0])) == TEXTS[0]
    assert across.convert_ids_to_tokens(across.encode("345")) == ["3", "4", "5"]


def test_special_tokens_are_one_token_each_and_last():
    harmony = build_tiny_tokenizer(TEXTS, 300)
    ids = [harmony.convert_tokens_to_ids(token) for token in HARMONY_SPECIAL_TOKENS]
    assert ids == list(range(len(harmony) - len(ids), len(harmony)))
    assert harmony.encode("<|start|>user<|message|>")[0] == harmony.convert_tokens_to_ids("<|start|>")
    assert harmony.eos_token == "<|return|>"
    assert harmony.chat_template is None


def test_chatml_template_renders_a_tool_conversation():
    tokenizer = build_tiny_tokenizer(TEXTS, 300, style="chatml")
    assert all(len(tokenizer.encode(token)) == 1 for token in CHATML_SPECIAL_TOKENS)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, tools=[{"name": "add"}]
    )
    assert rendered == (
        '<|im_start|>system\nBe brief.\n\nTools:\n{"name": "add"}<|im_end|>\n'
        "<|im_start|>user\n1?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n2<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="need 265"):
        build_tiny_tokenizer(TEXTS, 200)
