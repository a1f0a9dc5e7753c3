"""Any Hugging Face chat template (ChatML, Qwen3, Hermes, ...), token in, token out.

A template only knows how to write a whole conversation, so the tail after a reply is a difference of renderings: the
conversation is rendered with a placeholder where the reply's text was; what follows the placeholder is new, and what
comes before must be what was rendered before. If it is not (Qwen3, for one, forgets thoughts once a user speaks again),
the reply cannot be continued: a new segment starts from a full rendering, and `Prompt.dropped` says what changed.
Within a segment the drawn tokens stay as they were drawn; text is only ever encoded once.

What a message says cannot become structure: names of special tokens in it are cut out before the template sees them,
and encoded as ordinary text. In what the world says (user, tool, system) that goes for every added token, marks such as
`</tool_response>` included; in the assistant's own words marks keep their meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keel.chat.base import Prompt, Reply
from keel.chat.template_calls import (
    MalformedTextError,
    bare_name,
    call_arguments,
    read_messages,
    write_call,
)
from keel.chat.template_shield import Shield, any_of
from keel.chat.tokenizer import ChatFormatError, as_chat_tokenizer
from keel.types import Message, ToolSpec

# Made of characters that `Shield` keeps out of every message, so a rendering has them only where they were put.
_PLACEHOLDER = "\ue5a1keel-reply\ue5a1"
_THOUGHTS = "\ue5a2keel-thoughts\ue5a2"


class TemplateChat:
    """Messages to the tokens of the tokenizer's own chat template, and back.

    Calls are written in Hermes style (`<tool_call>`) and read in Hermes or JSON style; a call's recipient is
    `functions.<name>`, as in Harmony, so an environment serves both. Thoughts are channel "analysis"; plain content has
    channel None. Raises ChatFormatError if the tokenizer has no template, or the template does not end a reply with a
    special token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = as_chat_tokenizer(tokenizer)
        if not self.tokenizer.has_template:
            raise ChatFormatError(
                'chat.format "template": the tokenizer has no chat template; set one, or use another format'
            )
        special = [name for name, number in self.tokenizer.added_tokens.items() if number in self.tokenizer.special_ids]
        self._any_added, self._any_special = any_of(self.tokenizer.added_tokens), any_of(special)
        self._differ: bool | None = None
        self._end_name, self._end_id = self._probe()

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        eos = self.tokenizer.eos_id
        return (self._end_id,) if eos is None or eos == self._end_id else (self._end_id, eos)

    def start(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> Prompt:
        return Prompt(tuple(self._render(messages, tools)), extends=False)

    def extend(
        self,
        token_ids: Sequence[int],
        history: Sequence[Message],
        new: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
    ) -> Prompt:
        """The next prompt: `token_ids` and the tail the template writes after a reply.

        A reply that broke off is closed by the template's own end token, which counts as context. If the template
        writes anything before the reply differently now, a new segment starts instead.
        """
        before, reply = _split_reply(history)
        thought = any(message.channel == "analysis" for message in reply)
        shield, schemas = self._shield(), _schemas(tools)
        earlier, later = self._convert(before, shield), self._convert(new, shield)
        calls = [message for message in reply if message.recipient is not None]
        stand_in = self._turn(_PLACEHOLDER, _THOUGHTS if thought else "", calls, shield)
        render = self.tokenizer.render_template
        first = render(earlier, schemas, generate=False) if earlier else ""
        whole = render([*earlier, stand_in, *later], schemas, generate=True)
        changed = self._what_changed(first, whole, thought=thought)
        if not changed and calls and self._tool_turns_differ():
            changed = "the end of the reply: the template writes it elsewhere once its calls are answered"
        if changed:
            return Prompt(tuple(self._render([*history, *new], tools)), extends=False, dropped=(changed,))
        _, end, tail = self._after_reply(whole)
        seen = tuple(token_ids)
        if not seen or seen[-1] != self._end_id:
            tail = end + tail
        return Prompt((*seen, *shield.encode(self.tokenizer, tail)), extends=True)

    def demonstrate(self, message: Message, last: bool) -> tuple[int, ...]:
        """The tokens a perfect policy draws for `message`; demonstrations of one reply's messages are laid end to end.

        Where the template's prompt already opens `<think>`, a reply must begin with its thoughts (channel "analysis").
        Raises ChatFormatError for a message that is not the assistant's, or a call whose content is not a JSON object.
        """
        if message.role != "assistant":
            raise ChatFormatError(f"template: a demonstration must be the assistant's, got role {message.role!r}")
        if message.recipient is not None:
            text = write_call(message) + ("" if last else "\n")
        elif message.channel == "analysis":
            opening = "" if self._opens_thoughts else "<think>\n"
            text = f"{opening}{message.content}\n</think>\n\n"
        else:
            text = message.content + ("" if last else "\n")
        shield = self._shield()
        ids = shield.encode(self.tokenizer, shield.assistant(text))
        return (*ids, self._end_id) if last else tuple(ids)

    def parse(self, token_ids: Sequence[int]) -> Reply:
        """Reads a reply. A reply is malformed if it broke off, holds special tokens or unknown ids, leaves a mark open,
        or writes a call that is no JSON object with name and arguments. Never raises on account of the tokens."""
        ids = tuple(token_ids)
        text = self.tokenizer.decode(ids)
        if not self.tokenizer.known_ids.issuperset(ids):
            at = next(place for place, token in enumerate(ids) if token not in self.tokenizer.known_ids)
            return Reply((), text, f"token {ids[at]} at {at} is not in the vocabulary")
        ended = bool(ids) and ids[-1] in self.stop_token_ids
        body = ids[:-1] if ended else ids
        stray = [place for place, token in enumerate(body) if token in self.tokenizer.special_ids]
        if stray:
            name = self.tokenizer.decode(body[stray[0] : stray[0] + 1])
            return Reply((), text, f"special token {name} at {stray[0]} inside the reply")
        try:
            messages = tuple(read_messages(self.tokenizer.decode(body), thinking=self._opens_thoughts))
        except MalformedTextError as fault:
            return Reply((), text, str(fault))
        except RecursionError:
            return Reply((), text, "JSON nested too deeply")
        if not ended:
            return Reply(messages, text, "cut off before the end of the reply" if ids else "empty reply")
        return Reply(messages, text)

    def _probe(self) -> tuple[str, int]:
        """Name and id of the special token the template puts after a reply, found by rendering one; and, on the way,
        whether prompts open the thoughts and whether the template has a place for them."""
        asked = [{"role": "user", "content": "?"}]
        prompt = self.tokenizer.render_template(asked, (), generate=True)
        self._opens_thoughts = prompt.rstrip().endswith("<think>")
        thoughtful = {"role": "assistant", "content": _PLACEHOLDER, "reasoning_content": _THOUGHTS}
        self._knows_thoughts = _THOUGHTS in self.tokenizer.render_template([*asked, thoughtful], (), generate=False)
        answered = [*asked, {"role": "assistant", "content": _PLACEHOLDER}, *asked]
        rendered = self.tokenizer.render_template(answered, (), generate=False)
        found = self._any_special.search(rendered, rendered.find(_PLACEHOLDER) + len(_PLACEHOLDER))
        if _PLACEHOLDER not in rendered or found is None:
            raise ChatFormatError(
                "chat template: no special token follows an assistant message, so nothing would end a reply; "
                "give the template one (ChatML writes <|im_end|>)"
            )
        return found.group(), self.tokenizer.added_tokens[found.group()]

    def _tool_turns_differ(self) -> bool:
        """Whether a reply with calls ends, calls inside, in the same way before and after they are answered. Some
        templates put the answers in front of the end, or the calls behind it; a difference of renderings would lose or
        repeat them. Asked once. Raises ChatFormatError if the template writes nothing of an answer at all.
        """
        if self._differ is None:
            call = {"type": "function", "function": {"name": "f", "arguments": {}}}
            asked: list[dict[str, Any]] = [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": _PLACEHOLDER, "tool_calls": [call]},
            ]
            answered = [*asked, {"role": "tool", "name": "f", "content": _THOUGHTS}]
            alone = self.tokenizer.render_template(asked, (), generate=False)
            whole = self.tokenizer.render_template(answered, (), generate=True)
            if _THOUGHTS not in whole:
                raise ChatFormatError(
                    "chat template: it writes nothing of a message with role 'tool'; set another chat_template"
                )
            calls, end, rest = self._after_reply(alone)
            inside = calls == self._after_reply(whole)[0] and not self._any_special.search(rest)
            self._differ = _PLACEHOLDER in whole and not (end and inside)
        return self._differ

    def _what_changed(self, first: str, whole: str, *, thought: bool) -> str | None:
        if whole.count(_PLACEHOLDER) != 1:
            return "the reply: the template does not repeat it as it was"
        before = whole[: whole.index(_PLACEHOLDER)]
        if self._end_name not in whole[len(before) :]:
            return "the end of the reply: the template writes none in this prompt"
        if thought and _THOUGHTS not in before:
            return "thoughts of earlier turns: the template leaves them out of this prompt"
        if not before.startswith(first):
            return "earlier turns: the template writes them differently in this prompt"
        return None

    def _after_reply(self, rendered: str) -> tuple[str, str, str]:
        """What follows the placeholder: calls, the token that ends the reply, and the rest."""
        return rendered.partition(_PLACEHOLDER)[2].partition(self._end_name)

    def _shield(self) -> Shield:
        return Shield(self._any_added, self._any_special)

    def _render(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        """Tokens of a whole conversation, up to the start of the next reply."""
        shield = self._shield()
        converted = self._convert(messages, shield)
        return shield.encode(self.tokenizer, self.tokenizer.render_template(converted, _schemas(tools), generate=True))

    def _convert(self, messages: Sequence[Message], shield: Shield) -> list[dict[str, Any]]:
        """Keel's messages as a template wants them: one entry per turn, thoughts and calls inside the assistant's."""
        converted: list[dict[str, Any]] = []
        place = 0
        while place < len(messages):
            message = messages[place]
            if message.role == "tool":
                self._tool_turns_differ()
            if message.role != "assistant":
                role = "system" if message.role == "developer" else message.role
                entry = {"role": role, "content": shield.world(message.content)}
                name = {} if message.name is None else {"name": shield.world(bare_name(message.name))}
                converted.append({**entry, **name})
                place += 1
                continue
            stop = place
            while stop < len(messages) and messages[stop].role == "assistant":
                stop += 1
            reply = messages[place:stop]
            thoughts = [message.content for message in reply if message.channel == "analysis"]
            calls = [message for message in reply if message.recipient is not None]
            spoken = [m.content for m in reply if m.recipient is None and m.channel != "analysis"]
            content, thought = (shield.assistant("\n".join(parts)) for parts in (spoken, thoughts))
            converted.append(self._turn(content, thought, calls, shield))
            place = stop
        return converted

    def _turn(self, content: str, thoughts: str, calls: Sequence[Message], shield: Shield) -> dict[str, Any]:
        """An assistant's turn as a template wants it."""
        if thoughts and not self._knows_thoughts:
            content, thoughts = f"<think>\n{thoughts}\n</think>\n\n{content}", ""
        entry: dict[str, Any] = {"role": "assistant", "content": content}
        if thoughts:
            entry["reasoning_content"] = thoughts
        if calls:
            entry["tool_calls"] = [
                {
                    "type": "function",
                    "function": {
                        "name": bare_name(call.recipient or ""),
                        "arguments": shield.values(call_arguments(call)),
                    },
                }
                for call in calls
            ]
        return entry


def _schemas(tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
    """Tools as OpenAI-style schemas, which is what templates expect."""
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)},
        }
        for tool in tools
    ]


def _split_reply(history: Sequence[Message]) -> tuple[Sequence[Message], Sequence[Message]]:
    """History up to the last reply, and that reply (nothing, if it could not be read)."""
    stop = len(history)
    while stop and history[stop - 1].role == "assistant":
        stop -= 1
    return history[:stop], history[stop:]
