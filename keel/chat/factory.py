"""From the config's `[chat]` section and a tokenizer to a chat format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keel.chat.base import Chat
from keel.chat.harmony import HarmonyChat
from keel.chat.harmony_render import missing_tokens
from keel.chat.template import TemplateChat
from keel.chat.tokenizer import ChatFormatError, as_chat_tokenizer

if TYPE_CHECKING:
    from keel.config import ChatConfig


def make_chat(config: ChatConfig, tokenizer: Any) -> Chat:
    """The chat format `config` names, for a Hugging Face fast tokenizer or a `ChatTokenizer`.

    Format "auto" is Harmony if the tokenizer has all of Harmony's special tokens, else its own chat template.
    Raises ChatFormatError if the tokenizer cannot write the format.
    """
    adapted = as_chat_tokenizer(tokenizer)
    missing = missing_tokens(adapted)
    chosen = config.format
    if chosen == "auto":
        chosen = "template" if missing else "harmony"
        if chosen == "template" and not adapted.has_template:
            raise ChatFormatError(
                f"chat.format auto: the tokenizer has neither Harmony's tokens (missing {', '.join(missing)}) "
                "nor a chat template; use another tokenizer, or set its chat_template"
            )
    if chosen == "template":
        return TemplateChat(adapted)
    return HarmonyChat(
        adapted,
        reasoning_effort=config.reasoning_effort,
        system_date=config.system_date,
        system_message=config.system_message,
    )
