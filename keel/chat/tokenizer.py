"""What a chat format asks of a tokenizer, and the one adapter over Hugging Face's fast tokenizers. No torch.

Two encodings are kept apart. `encode(text)` is for text from the world or for header words: whatever it spells, no
added token comes out of it, so a tool that answers `<|end|>` cannot close its own message. `encode_markup(text)` is
for text of a chat template, where the names of special tokens mean the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from keel.types import UserFault

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BackendTokenizer
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\ufffd"
"""Stands in decoded text for an id that is not in the vocabulary, and for bytes that are not UTF-8."""


class ChatFormatError(UserFault, ValueError):
    """A tokenizer and a chat format do not fit, or a message cannot be written in it; says what, got and fix."""


class ChatTokenizer(Protocol):
    """The seam between chat formats and tokenizers."""

    @property
    def known_ids(self) -> frozenset[int]:
        """Every id that stands for a token."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens, which never spell text."""
        ...

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """Names and ids of tokens outside the learned vocabulary: the special ones and marks such as `<think>`."""
        ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def has_template(self) -> bool: ...

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; never an added token, whatever the text spells."""
        ...

    def encode_markup(self, text: str) -> list[int]:
        """Ids of a template's text, in which names of added tokens stand for the tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens spelled by name; unknown ids and bytes that are not UTF-8 become U+FFFD."""
        ...

    def render_template(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, generate: bool
    ) -> str:
        """The text of the tokenizer's own chat template; `generate` ends it with the start of a reply.

        Raises ChatFormatError if the template refuses the conversation.
        """
        ...


class FastTokenizer:
    """`ChatTokenizer` over a Hugging Face fast tokenizer.

    Raises ChatFormatError if `tokenizer` is not one (a slow, pure Python tokenizer has no backend to ask).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ChatFormatError(
                f"tokenizer: got {type(tokenizer).__name__}, needs a Hugging Face fast tokenizer; "
                "load it with keel.chat.load_tokenizer(path)"
            )
        self.hf_tokenizer = tokenizer
        self._backend: BackendTokenizer = backend
        added = backend.get_added_tokens_decoder()
        self.added_tokens: Mapping[str, int] = {token.content: number for number, token in added.items()}
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self.known_ids: frozenset[int] = frozenset(backend.get_vocab(with_added_tokens=True).values())
        names = sorted(self.added_tokens, key=len, reverse=True)
        self._spells_added = re.compile("|".join(map(re.escape, names))) if names else re.compile(r"(?!)")
        self._normalizes = backend.normalizer is not None

    @property
    def eos_id(self) -> int | None:
        number: int | None = self.hf_tokenizer.eos_token_id
        return number

    @property
    def has_template(self) -> bool:
        return bool(self.hf_tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        # The plain twin costs a second vocabulary in memory, so it is built only once a text needs it: one that spells
        # an added token, or that a normalizer might turn into such a text.
        if self._spells_added.search(text) or (self._normalizes and not text.isascii()):
            return self._ids(self._plain, text)
        return self._ids(self._backend, text)

    def encode_markup(self, text: str) -> list[int]:
        return self._ids(self._backend, text)

    def decode(self, ids: Sequence[int]) -> str:
        if self.known_ids.issuperset(ids):
            text: str = self._backend.decode(ids, skip_special_tokens=False)
            return text
        parts: list[str] = []
        start = 0
        for position, number in enumerate(ids):
            if number not in self.known_ids:
                parts += [self._backend.decode(ids[start:position], skip_special_tokens=False), REPLACEMENT]
                start = position + 1
        parts.append(self._backend.decode(ids[start:], skip_special_tokens=False))
        return "".join(parts)

    def render_template(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, generate: bool
    ) -> str:
        from jinja2 import TemplateError

        try:
            rendered = self.hf_tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=generate,
            )
        except (TemplateError, TypeError, ValueError) as error:
            # A template refuses by raising, or by doing what cannot be done with the value it was given.
            raise ChatFormatError(f"chat template: it refuses this conversation: {error}") from error
        return str(rendered)

    @staticmethod
    def _ids(backend: BackendTokenizer, text: str) -> list[int]:
        try:
            return list(backend.encode(text, add_special_tokens=False).ids)
        except (TypeError, UnicodeEncodeError):
            # Half of a surrogate pair, as broken JSON leaves behind, is not text any tokenizer takes.
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return list(backend.encode(whole, add_special_tokens=False).ids)

    @cached_property
    def _plain(self) -> BackendTokenizer:
        """The same tokenizer without its added tokens: every text is ordinary to it."""
        import json

        from tokenizers import Tokenizer

        description = json.loads(self._backend.to_str())
        description.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        plain = Tokenizer.from_str(json.dumps(description))
        for name, number in self.added_tokens.items():
            if number in self.special_ids and number in plain.encode(name, add_special_tokens=False).ids:
                raise ChatFormatError(
                    f"tokenizer: the text {name!r} cannot be told from the special token {number}, so what a tool "
                    "answers could end a message; use a tokenizer whose vocabulary leaves special tokens out"
                )
        return plain


def load_tokenizer(path: str | Path, *, revision: str = "") -> PreTrainedTokenizerFast:
    """The fast tokenizer of a Hugging Face directory (or hub id), its chat template included; torch is not imported.

    `revision` is a hub id's branch, tag or commit; code that lies beside a tokenizer is never run. Raises
    ChatFormatError if a local directory holds no `tokenizer.json`.
    """
    from transformers import PreTrainedTokenizerFast

    directory = Path(path)
    if directory.is_dir() and not (directory / "tokenizer.json").is_file():
        raise ChatFormatError(
            f"tokenizer: no tokenizer.json in {directory}; save one there with tokenizer.save_pretrained({str(path)!r})"
        )
    loaded: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(path), revision=revision or "main")
    return loaded


def as_chat_tokenizer(tokenizer: Any) -> ChatTokenizer:
    """`tokenizer` itself if it already speaks `ChatTokenizer`, else a `FastTokenizer` over it.

    Raises ChatFormatError if it is neither.
    """
    if hasattr(tokenizer, "encode_markup"):
        adapted: ChatTokenizer = tokenizer
        return adapted
    return FastTokenizer(tokenizer)
