"""Two small tokenizers: one with Harmony's special tokens, one with ChatML's, marks and a template that forgets."""

from __future__ import annotations

import pytest

from keel.chat.harmony import HarmonyChat
from keel.chat.template import TemplateChat
from keel.models.tiny import build_tiny_tokenizer
from keel.types import ToolSpec

TEXTS = [
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n\nReasoning: low",
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    'assistant commentary to=functions.calculator json {"expression": "12 * 34"} user tool',
    "What is 12 * 34? It is 408. Let me think. I will compute it.",
]

# Like Qwen3's, it leaves thoughts out of turns before the last question, and puts tools' answers into marks.
FORGETFUL_TEMPLATE = (
    "{%- set ns = namespace(question=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.question = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- if tools %}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}"
    "{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' }}"
    "{%- if m.reasoning_content and loop.index0 > ns.question %}"
    "{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}"
    "{%- endif %}"
    "{%- if m.role == 'tool' %}{{- '<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{%- else %}{{- m.content }}{%- endif %}"
    "{%- for call in m.tool_calls or [] %}"
    "{%- if m.content or not loop.first %}{{- '\\n' }}{%- endif %}"
    '{{- \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]


@pytest.fixture(scope="session")
def calculator() -> ToolSpec:
    parameters = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
    return ToolSpec("calculator", "Computes.", parameters)


@pytest.fixture(scope="session")
def harmony_tokenizer():
    return build_tiny_tokenizer(TEXTS * 3, 420)


@pytest.fixture(scope="session")
def harmony(harmony_tokenizer) -> HarmonyChat:
    return HarmonyChat(harmony_tokenizer, system_date="2025-11-03")


@pytest.fixture(scope="session")
def spell(harmony_tokenizer):
    """Token ids of a text in which `<|...|>` means the special token."""
    return lambda text: harmony_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="session")
def chatml_tokenizer():
    return build_tiny_tokenizer(TEXTS * 3, 400, style="chatml")


@pytest.fixture(scope="session")
def forgetful_tokenizer():
    tokenizer = build_tiny_tokenizer(TEXTS * 3, 400, style="chatml")
    tokenizer.add_tokens(MARKS)
    tokenizer.chat_template = FORGETFUL_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def chatml(chatml_tokenizer) -> TemplateChat:
    return TemplateChat(chatml_tokenizer)


@pytest.fixture(scope="session")
def forgetful(forgetful_tokenizer) -> TemplateChat:
    return TemplateChat(forgetful_tokenizer)
