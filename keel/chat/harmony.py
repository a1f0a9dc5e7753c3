"""Harmony, the chat format of GPT-OSS, for any tokenizer that has its special tokens.

Token in, token out: a prompt that continues an episode is the tokens seen so far plus a newly encoded tail; what was
drawn is never tokenized again, not even when a new segment starts, which copies the tokens of the messages it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from keel.chat.base import Prompt, Reply
from keel.chat.harmony_parse import HarmonyParser
from keel.chat.harmony_render import (
    IDENTITY,
    KNOWLEDGE_CUTOFF,
    HarmonyRenderer,
    ReasoningEffort,
    channel_of,
    developer_text,
    system_text,
)
from keel.chat.tokenizer import ChatFormatError, as_chat_tokenizer
from keel.types import Message, ToolSpec


class HarmonyChat:
    """Messages to Harmony tokens and back.

    `reasoning_effort`, `system_date`, `identity` and `knowledge_cutoff` are lines of the system message (empty: left
    out); `system_message` "none" leaves the whole message out, for a small model that never learned it. Leading system
    and developer messages of a conversation become the developer's instructions. A tool called `python` is the built-in
    one: it is described in the system message and called by its bare name; every other is in namespace `functions`
    unless its name carries its own (`browser.search`).

    Raises ChatFormatError if the tokenizer lacks one of the special tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        reasoning_effort: ReasoningEffort = "low",
        system_date: str = "",
        system_message: Literal["full", "none"] = "full",
        identity: str = IDENTITY,
        knowledge_cutoff: str = KNOWLEDGE_CUTOFF,
    ) -> None:
        self.tokenizer = as_chat_tokenizer(tokenizer)
        self._renderer = HarmonyRenderer(self.tokenizer)
        self._tokens = self._renderer.tokens
        self._parser = HarmonyParser(self.tokenizer, self._tokens)
        self._system_message = system_message
        self._reasoning_effort = reasoning_effort
        self._system_date = system_date
        self._identity = identity
        self._knowledge_cutoff = knowledge_cutoff

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return (self._tokens.return_, self._tokens.call)

    def start(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> Prompt:
        """The first prompt. Analysis before the last final message of `messages` is left out, and said so."""
        spoken = list(messages)
        leading: list[str] = []
        while spoken and spoken[0].role in ("system", "developer"):
            leading.append(spoken.pop(0).content)
        ids: list[int] = []
        if self._system_message == "full":
            ids += self._renderer.constant("system", self._system_text(tools))
        developer = developer_text("\n\n".join(leading), tools)
        if developer:
            ids += self._renderer.constant("developer", developer)
        kept, dropped = _without_old_analysis(spoken)
        for message in kept:
            ids += self._renderer.message(self._as_developer(message))
        return Prompt((*ids, *self._renderer.reply_start), extends=False, dropped=dropped)

    def extend(
        self,
        token_ids: Sequence[int],
        history: Sequence[Message],  # noqa: ARG002 - the protocol's; here the tokens say it all
        new: Sequence[Message],
        tools: Sequence[ToolSpec] = (),  # noqa: ARG002 - likewise: the first prompt declared them
    ) -> Prompt:
        """The next prompt.

        After a call, or a reply that broke off, the prompt is `token_ids` plus the tail; a message that broke off (at
        the length limit, say) is closed first, with `<|end|>`, which counts as context. After an answer (`<|return|>`)
        a new segment starts: `<|return|>` is never an input, so it becomes `<|end|>`, and analysis before the last
        final message is dropped, its tool traffic on the analysis channel included.
        """
        seen = tuple(token_ids)
        tail: list[int] = []
        for message in new:
            if message.role == "assistant":
                raise ChatFormatError("harmony: an assistant message to extend by; only the policy speaks as assistant")
            tail += self._renderer.message(self._as_developer(message))
        tail += self._renderer.reply_start
        if seen and seen[-1] == self._tokens.return_:
            kept, dropped = self._new_segment(seen)
            return Prompt((*kept, *tail), extends=False, dropped=dropped)
        return Prompt((*seen, *self._closing(seen), *tail), extends=True)

    def demonstrate(self, message: Message, last: bool) -> tuple[int, ...]:
        """The tokens a perfect policy draws for `message` after a prompt.

        With `last` they end the reply; without, they end in `<|end|><|start|>assistant`, so that demonstrations of a
        reply's messages can be laid end to end. A call ends the reply whatever `last` says, for `<|call|>` does.
        Raises ChatFormatError for a message that is not the assistant's.
        """
        if message.role != "assistant":
            raise ChatFormatError(f"harmony: a demonstration must be the assistant's, got role {message.role!r}")
        drawn = self._renderer.reply(message)
        if message.recipient is not None:
            return (*drawn, self._tokens.call)
        if last:
            return (*drawn, self._tokens.return_)
        return (*drawn, self._tokens.end, *self._renderer.reply_start)

    def parse(self, token_ids: Sequence[int]) -> Reply:
        """Reads a reply; see `keel.chat.harmony_parse` for what is malformed. Never raises on account of the tokens."""
        return self._parser.parse(token_ids)

    def _system_text(self, tools: Sequence[ToolSpec]) -> str:
        return system_text(
            reasoning_effort=self._reasoning_effort,
            system_date=self._system_date,
            identity=self._identity,
            knowledge_cutoff=self._knowledge_cutoff,
            tools=tools,
        )

    @staticmethod
    def _as_developer(message: Message) -> Message:
        """A system message of the world speaks as the developer: Harmony's own is about the model."""
        return message if message.role != "system" else Message("developer", message.content, name=message.name)

    def _closing(self, seen: tuple[int, ...]) -> tuple[int, ...]:
        """What closes the message that `seen` broke off in, if it did."""
        tokens = self._tokens
        if not seen or seen[-1] in (tokens.end, tokens.call):
            return ()
        for token in reversed(seen):
            if token == tokens.start:
                return (tokens.message, tokens.end)
            if token == tokens.message:
                break
        return (tokens.end,)

    def _new_segment(self, seen: tuple[int, ...]) -> tuple[list[int], tuple[str, ...]]:
        """The tokens of the messages that stay, and what is gone."""
        tokens = self._tokens
        starts = [position for position, token in enumerate(seen) if token == tokens.start]
        whole = [seen[start:stop] for start, stop in zip(starts, [*starts[1:], len(seen)], strict=True)]
        channels = [self._channel_of(message) for message in whole]
        last_final = max((place for place, channel in enumerate(channels) if channel == "final"), default=-1)
        kept: list[int] = []
        dropped: list[str] = []
        for place, (message, channel) in enumerate(zip(whole, channels, strict=True)):
            if channel == "analysis" and place < last_final:
                dropped.append(f"message {place}: analysis, {len(message)} tokens")
            else:
                kept += message
        kept[-1] = tokens.end
        return kept, (*dropped, "<|return|> became <|end|>")

    def _channel_of(self, message: tuple[int, ...]) -> str | None:
        tokens = self._tokens
        stop = message.index(tokens.message) if tokens.message in message else len(message)
        if tokens.channel not in message[:stop]:
            return None
        words = self.tokenizer.decode(message[message.index(tokens.channel) + 1 : stop]).split()
        return words[0] if words else None


def _without_old_analysis(messages: Sequence[Message]) -> tuple[list[Message], tuple[str, ...]]:
    """Messages without the analysis before the last final one, and what was left out."""
    finals = [
        place
        for place, message in enumerate(messages)
        if message.role == "assistant" and channel_of(message) == "final"
    ]
    last_final = finals[-1] if finals else -1
    kept: list[Message] = []
    dropped: list[str] = []
    for place, message in enumerate(messages):
        if message.channel == "analysis" and place < last_final:
            dropped.append(f"message {place}: analysis, {len(message.content)} characters")
        else:
            kept.append(message)
    return kept, tuple(dropped)
