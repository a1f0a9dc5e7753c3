"""Harmony, from drawn tokens to messages. Whatever the tokens are, the outcome is a `Reply`.

A reply follows the prompt `<|start|>assistant`, so its first header begins inside that one. It is well formed if it
is a chain of assistant messages, each but the last ended by `<|end|>`, and the last is either a call, with a recipient
and ended by `<|call|>`, or an answer, on the final channel and ended by `<|return|>`: after a reply that is not
malformed there is always something to call or an answer to judge. The recipient is read from the role part and from
the channel part of the header, the content type with and without `<|constrain|>`.

Content that is not UTF-8 is not malformed: its bytes read as U+FFFD, and its tokens are kept as they are anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keel.chat.base import Reply
from keel.chat.harmony_render import CHANNELS, HarmonyTokens
from keel.chat.tokenizer import ChatTokenizer
from keel.types import Message

_MOST_REMEMBERED_HEADERS = 4096


class _MalformedError(Exception):
    """Ends the reading of a reply; its text is the reason."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a drawn header says."""

    channel: str
    recipient: str | None = None
    content_type: str | None = None


class HarmonyParser:
    """Tokens to messages; the headers of a run are few, so each is read once and remembered."""

    def __init__(self, tokenizer: ChatTokenizer, tokens: HarmonyTokens) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._enders = frozenset({tokens.end, tokens.return_, tokens.call})
        self._headers: dict[tuple[bool, tuple[int, ...]], Header | str] = {}

    def parse(self, token_ids: Sequence[int]) -> Reply:
        """Reads a reply; never raises on account of what was drawn.

        `Reply.malformed` is the first fault as one line, with the position of the token at fault.
        """
        ids = tuple(token_ids)
        messages: list[Message] = []
        reason: str | None = None
        try:
            self._read(ids, messages)
        except _MalformedError as fault:
            reason = str(fault)
        return Reply(messages=tuple(messages), text=self._tokenizer.decode(ids), malformed=reason)

    def _read(self, ids: tuple[int, ...], messages: list[Message]) -> None:
        known = self._tokenizer.known_ids
        if not known.issuperset(ids):
            at = next(position for position, token in enumerate(ids) if token not in known)
            raise _MalformedError(f"token {ids[at]} at {at} is not in the vocabulary")
        special = self._tokenizer.special_ids
        marks = [position for position, token in enumerate(ids) if token in special]
        start, next_mark = 0, 0
        while True:
            next_mark, header = self._read_header(ids, start, marks, next_mark, first=start == 0)
            begin = marks[next_mark] + 1
            next_mark += 1
            stop = marks[next_mark] if next_mark < len(marks) else len(ids)
            content = self._tokenizer.decode(ids[begin:stop])
            message = Message("assistant", content, header.channel, header.recipient, None, header.content_type)
            if stop == len(ids):
                messages.append(message)
                raise _MalformedError("cut off inside a message's content")
            if ids[stop] not in self._enders:
                raise _MalformedError(f"{self._spell(ids, stop)} inside a message's content")
            messages.append(message)
            if self._ends_reply(ids, stop, message):
                return
            start = self._next_header(ids, stop)
            next_mark += 2

    def _read_header(
        self, ids: tuple[int, ...], start: int, marks: list[int], next_mark: int, *, first: bool
    ) -> tuple[int, Header]:
        """(index into `marks` of the header's `<|message|>`, what the header says)."""
        inner = (self._tokens.channel, self._tokens.constrain)
        while next_mark < len(marks) and ids[marks[next_mark]] in inner:
            next_mark += 1
        if next_mark == len(marks):
            raise _MalformedError("cut off inside a message's header" if len(ids) else "empty reply")
        if ids[marks[next_mark]] != self._tokens.message:
            raise _MalformedError(f"{self._spell(ids, marks[next_mark])} inside a message's header")
        key = (first, ids[start : marks[next_mark]])
        header = self._headers.get(key)
        if header is None:
            header = self._understand(*key)
            if len(self._headers) < _MOST_REMEMBERED_HEADERS:
                self._headers[key] = header
        if isinstance(header, str):
            raise _MalformedError(f"{header} in the header at {start}")
        return next_mark, header

    def _ends_reply(self, ids: tuple[int, ...], stop: int, message: Message) -> bool:
        """Does the token at `stop` rightly end the reply? Raises if it wrongly does, or ends the wrong message."""
        ender, is_call = ids[stop], message.recipient is not None
        if is_call != (ender == self._tokens.call):
            kind = "a call" if is_call else f"a message on channel {message.channel}"
            raise _MalformedError(f"{kind} ended by {self._spell(ids, stop)}")
        if ender == self._tokens.end:
            return False
        if ender == self._tokens.return_ and message.channel != "final":
            raise _MalformedError(f"the reply ends on channel {message.channel}, without a call or an answer")
        if stop + 1 != len(ids):
            raise _MalformedError(f"tokens after the {self._spell(ids, stop)}")
        return True

    def _next_header(self, ids: tuple[int, ...], stop: int) -> int:
        if stop + 1 == len(ids):
            raise _MalformedError("cut off after a message, without a call or an answer")
        if ids[stop + 1] != self._tokens.start:
            raise _MalformedError(f"{self._spell(ids, stop + 1)} between messages, where only <|start|> may be")
        return stop + 2

    def _understand(self, first: bool, header: tuple[int, ...]) -> Header | str:
        """What a header says, or what is wrong with it. `header` has no special tokens but channel and constrain."""
        tokens, decode = self._tokens, self._tokenizer.decode
        if header.count(tokens.channel) != 1:
            return f"{header.count(tokens.channel)} channels"
        at = header.index(tokens.channel)
        role_part, channel_part, type_part = header[:at], header[at + 1 :], None
        if tokens.constrain in channel_part:
            at = channel_part.index(tokens.constrain)
            channel_part, type_part = channel_part[:at], channel_part[at + 1 :]
        if tokens.constrain in role_part or (type_part is not None and tokens.constrain in type_part):
            return "a misplaced <|constrain|>"
        role_words = ("assistant" * first + decode(role_part)).split()
        if role_words[:1] != ["assistant"]:
            return f"role {_brief(role_words[0])}" if role_words else "no role"
        channel_words = decode(channel_part).split()
        if not channel_words or channel_words[0] not in CHANNELS:
            return f"channel {_brief(channel_words[0])}" if channel_words else "no channel name"
        type_words = None if type_part is None else decode(type_part).split()
        return _address(role_words[1:], channel_words[0], channel_words[1:], type_words)

    def _spell(self, ids: tuple[int, ...], position: int) -> str:
        return f"{_brief(self._tokenizer.decode(ids[position : position + 1]))} at {position}"


def _address(role_words: list[str], channel: str, words: list[str], type_words: list[str] | None) -> Header | str:
    """Recipient and content type, from the words after the role, after the channel, and after `<|constrain|>`."""
    addresses = [word[3:] for word in role_words + words if word.startswith("to=")]
    rest = [word for word in words if not word.startswith("to=")]
    strangers = [word for word in role_words if not word.startswith("to=")] + rest[1:]
    if type_words is not None:
        strangers += rest[:1] + type_words[1:]
        rest = type_words[:1]
        if not rest:
            return "no content type after <|constrain|>"
    if strangers:
        return f"a stray {_brief(strangers[0])}"
    if len(addresses) > 1 or not all(addresses):
        return "two recipients" if len(addresses) > 1 else "an empty recipient"
    if addresses and channel == "final":
        return "a call on the final channel"
    return Header(channel, addresses[0] if addresses else None, rest[0] if rest else None)


def _brief(word: str) -> str:
    """One short line out of what may be anything."""
    shown = repr(word)
    return shown if len(shown) <= 40 else f"{shown[:36]}...'"
