"""Harmony, from messages to tokens.

A message is `<|start|>header<|message|>content<|end|>`; the header names the role (a tool's name for a tool's answer),
the channel, the recipient of a call and the type of its content. Headers and contents are always encoded as ordinary
text between special tokens placed here, so nothing a message says can change the structure.

OpenAI publishes two renderers which differ; this is what is followed where, and why:

- A call. The library writes `assistant to=functions.f<|channel|>commentary <|constrain|>json`, the chat template
  `assistant to=functions.f<|channel|>commentary json`, and the format guide, showing what the model draws,
  `assistant<|channel|>commentary to=functions.f <|constrain|>json`. The last is written here: a call is drawn after the
  prompt `<|start|>assistant`, so the drawn form is what a policy should be shown. All three are read.
- `code`. Built-in `python` is drawn as `<|channel|>analysis to=python code<|message|>`: type `code` has no
  `<|constrain|>`, every other type has.
- A tool's answer. The template writes its JSON encoding (a string in quotes), library and guide the text: the text.
- A developer message without tools. The template ends it with an empty line, library and guide do not: none.
- The date. The template always writes one, the library only if there is one: only if there is one.
- Instructions. As in the template, a leading system message is taken for developer instructions: Harmony's own system
  message is about the model, and is written from the options of the chat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from keel.chat.tokenizer import ChatFormatError, ChatTokenizer
from keel.chat.typescript import FUNCTIONS, namespace_of, tools_section
from keel.types import Message, ToolSpec

ReasoningEffort = Literal["low", "medium", "high"]
CHANNELS = ("analysis", "commentary", "final")
IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
BARE_CONTENT_TYPES = frozenset({"code"})
PYTHON = "python"
_MOST_REMEMBERED = 1024
# Part of the published format: the model was trained with these very words.
PYTHON_DESCRIPTION = (
    "Use this tool to execute Python code in your chain of thought. The code will not be shown to the user. This tool "
    "should be used for internal reasoning, but not for code that is intended to be visible to the user (e.g. when "
    "creating plots, tables, or files).\n\nWhen you send a message containing Python code to python, it will be "
    "executed in a stateful Jupyter notebook environment. python will respond with the output of the execution or time "
    "out after 120.0 seconds. The drive at '/mnt/data' can be used to save and persist user files. Internet access for "
    "this session is UNKNOWN. Depends on the cluster."
)
_TOKEN_NAMES = {
    "start": "<|start|>",
    "end": "<|end|>",
    "message": "<|message|>",
    "channel": "<|channel|>",
    "constrain": "<|constrain|>",
    "return_": "<|return|>",
    "call": "<|call|>",
}


@dataclass(frozen=True, slots=True)
class HarmonyTokens:
    """Ids of the tokens that make up Harmony's structure."""

    start: int
    end: int
    message: int
    channel: int
    constrain: int
    return_: int
    call: int

    @classmethod
    def of(cls, tokenizer: ChatTokenizer) -> HarmonyTokens:
        """Raises ChatFormatError, naming them, if the tokenizer lacks some."""
        missing = missing_tokens(tokenizer)
        if missing:
            raise ChatFormatError(
                f"harmony: the tokenizer has no special token {', '.join(missing)}; "
                'use a GPT-OSS tokenizer, or chat.format = "template"'
            )
        return cls(**{field: tokenizer.added_tokens[name] for field, name in _TOKEN_NAMES.items()})


def missing_tokens(tokenizer: ChatTokenizer) -> list[str]:
    """Names of Harmony's special tokens that `tokenizer` does not have."""
    return [name for name in _TOKEN_NAMES.values() if tokenizer.added_tokens.get(name) not in tokenizer.special_ids]


def is_builtin(tool: ToolSpec) -> bool:
    """Is it the built-in `python`, described in the system message and called by its bare name?"""
    return tool.name == PYTHON


def channel_of(message: Message) -> str:
    """The channel of an assistant message; by default `final`, or for a call `commentary` (`python`: `analysis`)."""
    if message.channel is not None:
        return message.channel
    if message.recipient is None:
        return "final"
    return "analysis" if message.recipient == PYTHON else "commentary"


def system_text(
    *,
    reasoning_effort: ReasoningEffort,
    system_date: str,
    identity: str,
    knowledge_cutoff: str,
    tools: Sequence[ToolSpec],
) -> str:
    """The content of the system message; empty identity, cutoff or date leave their line out."""
    dated = [("Knowledge cutoff: ", knowledge_cutoff), ("Current date: ", system_date)]
    head = "\n".join([identity] * bool(identity) + [label + value for label, value in dated if value])
    sections = [head] if head else []
    sections.append(f"Reasoning: {reasoning_effort}")
    builtin = [tool for tool in tools if is_builtin(tool)]
    if builtin:
        sections.append(f"# Tools\n\n## {PYTHON}\n\n{builtin[0].description or PYTHON_DESCRIPTION}")
    channels = f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."
    if any(not is_builtin(tool) and namespace_of(tool.name)[0] == FUNCTIONS for tool in tools):
        channels += f"\nCalls to these tools must go to the commentary channel: '{FUNCTIONS}'."
    return "\n\n".join([*sections, channels])


def developer_text(instructions: str, tools: Sequence[ToolSpec]) -> str:
    """The content of a developer message; empty if there is nothing to say."""
    sections = [f"# Instructions\n\n{instructions}"] if instructions else []
    declared = [tool for tool in tools if not is_builtin(tool)]
    if declared:
        sections.append(tools_section(declared))
    return "\n\n".join(sections)


class HarmonyRenderer:
    """Messages to tokens, one message at a time; headers are encoded once and remembered."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens = HarmonyTokens.of(tokenizer)
        self.reply_start = (self.tokens.start, *tokenizer.encode("assistant"))
        self._headers: dict[tuple[str, str | None, str | None, str | None], tuple[int, ...]] = {}
        self._constants: dict[tuple[str, str], tuple[int, ...]] = {}

    def message(self, message: Message) -> list[int]:
        """A whole message of a prompt, from `<|start|>` to `<|end|>` (`<|call|>` for a call)."""
        if message.role == "assistant":
            return [*self.reply_start, *self.reply(message), self.ending(message)]
        header = self._world_header(message)
        content = f"# Instructions\n\n{message.content}" if message.role == "developer" else message.content
        return [*header, *self.tokenizer.encode(content), self.tokens.end]

    def constant(self, role: str, text: str) -> tuple[int, ...]:
        """A message that many prompts share, encoded once."""
        known = self._constants.get((role, text))
        if known is None:
            known = (*self._header(role, None, None, None), *self.tokenizer.encode(text), self.tokens.end)
            if len(self._constants) < _MOST_REMEMBERED:
                self._constants[role, text] = known
        return known

    def reply(self, message: Message) -> list[int]:
        """An assistant message as it is drawn after `<|start|>assistant`, without its last token."""
        header = self._header("assistant", channel_of(message), message.recipient, message.content_type)
        return [*header, *self.tokenizer.encode(message.content)]

    def ending(self, message: Message) -> int:
        """The token that ends an assistant message inside a prompt."""
        return self.tokens.end if message.recipient is None else self.tokens.call

    def _world_header(self, message: Message) -> tuple[int, ...]:
        if message.role == "tool":
            if not message.name:
                raise ChatFormatError(
                    "harmony: a tool's answer has no name; set Message.name to the full one, as in 'functions.search'"
                )
            channel = message.channel or ("analysis" if message.name == PYTHON else "commentary")
            return self._header(message.name, channel, message.recipient or "assistant", None)
        role = f"{message.role}:{message.name}" if message.name else message.role
        return self._header(role, message.channel, message.recipient, None)

    def _header(
        self, role: str, channel: str | None, recipient: str | None, content_type: str | None
    ) -> tuple[int, ...]:
        key = (role, channel, recipient, content_type)
        known = self._headers.get(key)
        if known is None:
            known = self._encode_header(*key)
            if len(self._headers) < _MOST_REMEMBERED:
                self._headers[key] = known
        return known

    def _encode_header(
        self, role: str, channel: str | None, recipient: str | None, content_type: str | None
    ) -> tuple[int, ...]:
        """Header of a message up to `<|message|>`; an assistant's begins after its role, which ends the prompt."""
        for what, word in (("name", role), ("channel", channel), ("recipient", recipient), ("type", content_type)):
            if word is not None and (not word or word.split() != [word]):
                raise ChatFormatError(f"harmony: a message's {what} must be one word without spaces, got {word!r}")
        tokens, encode = self.tokens, self.tokenizer.encode
        address = f" to={recipient}" if recipient is not None else ""
        if role != "assistant":
            named = [tokens.channel, *encode(channel)] if channel else []
            return (tokens.start, *encode(role + address), *named, tokens.message)
        if channel not in CHANNELS:
            raise ChatFormatError(f"harmony: channel {channel!r} of an assistant message; known: {', '.join(CHANNELS)}")
        words = f"{channel}{address}"
        if content_type is None:
            return (tokens.channel, *encode(words), tokens.message)
        if content_type in BARE_CONTENT_TYPES:
            return (tokens.channel, *encode(f"{words} {content_type}"), tokens.message)
        return (tokens.channel, *encode(f"{words} "), tokens.constrain, *encode(content_type), tokens.message)
