"""Messages to tokens and back: GPT-OSS's Harmony format, and any tokenizer's own chat template. No torch."""

from keel.chat.base import Chat, Prompt, Reply
from keel.chat.factory import make_chat
from keel.chat.tokenizer import ChatFormatError, load_tokenizer

__all__ = ["Chat", "ChatFormatError", "Prompt", "Reply", "load_tokenizer", "make_chat"]
