"""Harmony against what OpenAI publishes: the tokens of openai-harmony, the texts of the GPT-OSS chat template."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from keel.chat.harmony import HarmonyChat
from keel.chat.typescript import tools_section
from keel.types import Message, ToolSpec

FILES = sorted((Path(__file__).parent / "harmony").glob("*.json"))
GOLDENS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}
CONVERSATIONS = [name for name, golden in GOLDENS.items() if "given" in golden]
REPLIES = GOLDENS["replies"]
SCHEMAS = GOLDENS["schemas"]
# What the library reads in another way than Keel, and why.
LIBRARY_SLIPS = {
    '<|channel|>final <|constrain|>json<|message|>{"a": 1}<|return|>': "it takes a lone content type for a recipient"
}


@pytest.fixture(scope="module")
def chats(published_tokenizer):
    return lambda options: HarmonyChat(published_tokenizer, **options)


def given(name):
    half = GOLDENS[name]["given"]
    tools, messages = half["tools"], half["messages"]
    return half["options"], [ToolSpec(**tool) for tool in tools], [Message(**message) for message in messages]


def test_there_are_enough_goldens():
    assert len(CONVERSATIONS) >= 12
    assert len(REPLIES["drawn"]) >= 12


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompt_is_the_librarys_token_for_token(name, chats):
    options, tools, messages = given(name)
    prompt = chats(options).start(messages, tools)
    assert not prompt.extends
    assert list(prompt.token_ids) == GOLDENS[name]["library"]["tokens"]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompt_grows_into_the_same_tokens(name, chats):
    """Started with the first question and extended reply by reply, the last prompt is the library's as well."""
    options, tools, messages = given(name)
    chat = chats(options)
    first = next((place for place, message in enumerate(messages) if message.role == "assistant"), len(messages))
    prompt, place = chat.start(messages[:first], tools), first
    while place < len(messages):
        stop = next(at for at in range(place, len(messages)) if messages[at].role != "assistant")
        following = next((at for at in range(stop, len(messages)) if messages[at].role == "assistant"), len(messages))
        drawn = []
        for at in range(place, stop):
            drawn += chat.demonstrate(messages[at], last=at == stop - 1)
        assert chat.parse(drawn).messages == tuple(messages[place:stop])
        seen = (*prompt.token_ids, *drawn)
        prompt = chat.extend(seen, messages[:stop], messages[stop:following], tools)
        assert prompt.extends == (messages[stop - 1].channel != "final")
        if prompt.extends:
            assert prompt.token_ids[: len(seen)] == seen
            assert not prompt.dropped
        else:
            assert prompt.dropped
        place = following
    assert list(prompt.token_ids) == GOLDENS[name]["library"]["tokens"]


@pytest.mark.parametrize("name", ["effort_low", "effort_medium", "effort_high", "multi_turn"])
def test_text_is_the_templates_where_the_two_renderers_agree(name, chats, published_tokenizer):
    options, tools, messages = given(name)
    prompt = chats(options).start(messages, tools)
    assert published_tokenizer.decode(prompt.token_ids) == GOLDENS[name]["template"]["text"]


def test_template_puts_one_more_comma_behind_a_default(chats, published_tokenizer):
    options, tools, messages = given("tool_flat")
    text = published_tokenizer.decode(chats(options).start(messages, tools).token_ids)
    shipped = re.sub("(// default: .*)", r"\1,", text)
    assert shipped == GOLDENS["tool_flat"]["template"]["text"]


@pytest.mark.parametrize("name", ["call_and_reply", "call_twice", "multi_turn_tool"])
def test_template_differs_only_where_the_docstring_says(name, chats, published_tokenizer):
    """A call's header and the quotes around a tool's answer: with these two changes the texts are equal."""
    options, tools, messages = given(name)
    quoted = [replace(m, content=json.dumps(m.content)) if m.role == "tool" else m for m in messages]
    text = published_tokenizer.decode(chats(options).start(quoted, tools).token_ids)
    drawn = "assistant<|channel|>commentary to=functions.calculator <|constrain|>json<|message|>"
    assert drawn in text
    shipped = "assistant to=functions.calculator<|channel|>commentary json<|message|>"
    assert text.replace(drawn, shipped) == GOLDENS[name]["template"]["text"]


@pytest.mark.parametrize("place", range(len(SCHEMAS["schemas"])))
def test_schemas_are_declared_as_the_library_declares_them(place):
    tool = ToolSpec("f", "Does it.", SCHEMAS["schemas"][place])
    assert tools_section([tool]) == SCHEMAS["library"][place]


@pytest.mark.parametrize("place", range(len(REPLIES["drawn"])))
def test_replies_read_as_the_library_reads_them(place, chats):
    text, read = REPLIES["drawn"][place], REPLIES["library"][place]
    reply = chats({}).parse(read["tokens"])
    assert reply.text == text
    if text in LIBRARY_SLIPS:
        assert reply.malformed is None
        assert reply.messages == (Message("assistant", '{"a": 1}', "final", content_type="json"),)
    elif read["messages"] is None:
        assert reply.malformed is not None
        assert "\n" not in reply.malformed
    else:
        for message in read["messages"]:
            message["content_type"] = (message["content_type"] or "").removeprefix("<|constrain|>") or None
        assert reply.malformed is None
        assert reply.messages == tuple(Message("assistant", **message) for message in read["messages"])


@pytest.mark.skipif("TIKTOKEN_ENCODINGS_BASE" not in os.environ, reason="needs the o200k vocabulary, see README.md")
def test_library_reads_the_same_today():
    """The library itself, where its vocabulary is at hand; elsewhere the files speak for it."""
    harmony = pytest.importorskip("openai_harmony")
    encoding = harmony.load_harmony_encoding("HarmonyGptOss")
    for name in CONVERSATIONS:
        library = GOLDENS[name]["library"]
        assert encoding.decode(library["tokens"]) == library["text"]
    for text, read in zip(REPLIES["drawn"], REPLIES["library"], strict=True):
        assert encoding.encode(text, allowed_special="all") == read["tokens"]
