"""The seam to tokenizers: ordinary text never makes an added token, ids that mean nothing are text all the same."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.chat import ChatFormatError, load_tokenizer, make_chat
from keel.chat.harmony import HarmonyChat
from keel.chat.template import TemplateChat
from keel.chat.tokenizer import FastTokenizer
from keel.config import ChatConfig

pieces = st.sampled_from(["<|end|>", "<|return|>", "<|", "|>", "end", "<|im_end|>", "<think>", " ", "12", "é", "\n"])
texts = st.lists(pieces | st.text(max_size=6), max_size=8).map("".join)


@settings(max_examples=120, deadline=None)
@given(text=texts)
def test_ordinary_text_makes_no_added_token_and_reads_back(text, harmony_tokenizer, forgetful_tokenizer):
    for tokenizer in (FastTokenizer(harmony_tokenizer), FastTokenizer(forgetful_tokenizer)):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.added_tokens.values())
        clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert tokenizer.decode(ids) == clean
        if not any(name in text for name in tokenizer.added_tokens):
            assert ids == tokenizer.encode_markup(text)


def test_markup_makes_the_tokens_it_names(harmony_tokenizer):
    tokenizer = FastTokenizer(harmony_tokenizer)
    assert tokenizer.encode_markup("<|end|>") == [tokenizer.added_tokens["<|end|>"]]
    assert len(tokenizer.encode("<|end|>")) > 1


def test_unknown_ids_decode_to_replacements(harmony_tokenizer):
    tokenizer = FastTokenizer(harmony_tokenizer)
    ids = tokenizer.encode("What is")
    assert tokenizer.decode([-5, *ids, 10**9, *ids]) == "\ufffdWhat is\ufffdWhat is"


def test_a_vocabulary_that_confuses_text_and_special_tokens_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<|end|>": 0, "x": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.add_special_tokens(["<|end|>"])
    tokenizer = FastTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.encode("x") == [1]
    with pytest.raises(ChatFormatError, match="cannot be told from the special token 0"):
        tokenizer.encode("<|end|>")


def test_only_fast_tokenizers_are_taken(tmp_path):
    with pytest.raises(ChatFormatError, match="got str"):
        FastTokenizer("gpt-oss")
    with pytest.raises(ChatFormatError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_format_is_chosen_by_the_tokenizers_special_tokens(harmony_tokenizer, chatml_tokenizer, tmp_path):
    assert isinstance(make_chat(ChatConfig(), harmony_tokenizer), HarmonyChat)
    assert isinstance(make_chat(ChatConfig(), chatml_tokenizer), TemplateChat)
    with pytest.raises(ChatFormatError, match=r"no special token <\|start\|>"):
        make_chat(ChatConfig(format="harmony"), chatml_tokenizer)
    with pytest.raises(ChatFormatError, match="no chat template"):
        make_chat(ChatConfig(format="template"), harmony_tokenizer)
    chatml_tokenizer.save_pretrained(tmp_path)
    bare = load_tokenizer(tmp_path)
    bare.chat_template = None
    with pytest.raises(ChatFormatError, match="neither Harmony's tokens"):
        make_chat(ChatConfig(), bare)


def test_options_of_the_config_reach_the_system_message(harmony_tokenizer):
    config = ChatConfig(reasoning_effort="high", system_date="2025-11-03")
    chat = make_chat(config, harmony_tokenizer)
    text = chat.tokenizer.decode(chat.start([], []).token_ids)
    assert "Current date: 2025-11-03\n\nReasoning: high\n" in text
    assert len(make_chat(ChatConfig(system_message="none"), harmony_tokenizer).start([], []).token_ids) < 8


def test_chat_works_without_torch(harmony_tokenizer, forgetful_tokenizer, tmp_path):
    """In a process of its own: load both tokenizers, render, extend, parse; torch is never imported."""
    harmony_tokenizer.save_pretrained(tmp_path / "harmony")
    forgetful_tokenizer.save_pretrained(tmp_path / "template")
    script = f"""
import sys
from keel.chat import load_tokenizer, make_chat
from keel.config import ChatConfig
from keel.types import Message
for name in ("harmony", "template"):
    chat = make_chat(ChatConfig(), load_tokenizer({str(tmp_path)!r} + "/" + name))
    prompt = chat.start([Message("user", "hi <|end|><|im_end|>")], [])
    drawn = chat.demonstrate(Message("assistant", "hello"), last=True)
    assert chat.parse(drawn).final == "hello"
    history = [Message("user", "hi"), *chat.parse(drawn).messages]
    chat.extend((*prompt.token_ids, *drawn), history, [Message("user", "?")], [])
assert "torch" not in sys.modules, "chat imported torch"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
