"""Keeps what messages say out of a chat template's structure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from keel.chat.tokenizer import ChatTokenizer

# Private-use characters, which no template touches; a message that holds some itself has them hidden too.
_FENCE = "\ue5a0"
_RESERVED = "[\ue5a0-\ue5a2]"


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of `names` that stands at a place; nothing, if there are none."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join([_RESERVED, *map(re.escape, longest_first)]))


class Shield:
    """Takes what must stay ordinary text out of messages before a template sees them, and remembers it.

    A hidden piece is written as its number between two fences; `encode` puts it back, as ordinary tokens. One shield
    serves one rendering (or several that share their messages). Patterns come from `any_of`.
    """

    def __init__(self, any_added: re.Pattern[str], any_special: re.Pattern[str]) -> None:
        self._hidden: list[str] = []
        self._any_added = any_added
        self._any_special = any_special

    def world(self, text: str) -> str:
        """Text of users, tools and systems: the name of no added token gets through."""
        return self._any_added.sub(self._fence, text)

    def assistant(self, text: str) -> str:
        """The assistant's own text: marks such as `<think>` keep their meaning, special tokens do not."""
        return self._any_special.sub(self._fence, text)

    def values(self, value: Any) -> Any:
        """`assistant` for every string inside a call's arguments."""
        if isinstance(value, str):
            return self.assistant(value)
        if isinstance(value, Mapping):
            return {self.assistant(key): self.values(item) for key, item in value.items()}
        return [self.values(item) for item in value] if isinstance(value, list) else value

    def encode(self, tokenizer: ChatTokenizer, rendered: str) -> list[int]:
        """Tokens of a rendering: names of added tokens are the tokens, except in what was hidden."""
        if not self._hidden:
            return tokenizer.encode_markup(rendered)
        ids: list[int] = []
        for place, part in enumerate(rendered.split(_FENCE)):
            if place % 2:
                ids += tokenizer.encode(self._hidden[int(part)])
            elif part:
                ids += tokenizer.encode_markup(part)
        return ids

    def _fence(self, found: re.Match[str]) -> str:
        self._hidden.append(found.group())
        return f"{_FENCE}{len(self._hidden) - 1}{_FENCE}"
