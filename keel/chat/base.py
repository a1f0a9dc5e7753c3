"""The protocol between conversations and tokens: what a chat format must do for the rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from keel.types import Message, ToolSpec


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to generate from.

    `extends` says whether `token_ids` begins with every token the engine has seen so far (prompt and drawn): then
    only the tail is new. False starts a new segment; `dropped` says what of the earlier turns is not in it.
    """

    token_ids: tuple[int, ...]
    extends: bool
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """A policy's reply, read back. `malformed` is None or a one-line reason; a malformed reply is an ordinary
    outcome that can be trained on. `messages` holds what could be read before the fault."""

    messages: tuple[Message, ...]
    text: str
    malformed: str | None = None

    @property
    def calls(self) -> tuple[Message, ...]:
        """Messages addressed to a tool."""
        return tuple(message for message in self.messages if message.recipient is not None)

    @property
    def final(self) -> str | None:
        """The answer on the final channel (or, without channels, the plain content), if there is one."""
        if self.malformed is not None or self.calls:
            return None
        for message in reversed(self.messages):
            if message.channel in (None, "final"):
                return message.content
        return None


class Chat(Protocol):
    """Messages to tokens and back. Stateless: a conversation's state is its messages and its tokens."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...

    def start(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Prompt:
        """The first prompt; `extends` is False."""
        ...

    def extend(
        self,
        token_ids: Sequence[int],
        history: Sequence[Message],
        new: Sequence[Message],
        tools: Sequence[ToolSpec],
    ) -> Prompt:
        """The next prompt. `token_ids` is what the engine saw, the reply included; `history` all messages so far, the
        parsed reply included; `new` the environment's answer."""
        ...

    def demonstrate(self, message: Message, last: bool) -> tuple[int, ...]:
        """The tokens a perfect policy would draw for `message`, right after a prompt; `last` ends the reply."""
        ...

    def parse(self, token_ids: Sequence[int]) -> Reply: ...
