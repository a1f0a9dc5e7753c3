"""Messages to tokens and back: what was written is read again, and later turns only ever add to earlier tokens."""

from __future__ import annotations

from collections.abc import Iterator

from keel.chat.base import Chat, Reply
from keel.chat.harmony import HarmonyChat
from keel.preflights.context import Context, SkippedError, check
from keel.preflights.probes import ANSWERS, LOOKUP, TOPICS
from keel.preflights.result import Check
from keel.types import Message

TEXTS = (
    "The answer is 42.",
    "  two spaces, a tab\tand a line\nbreak ",
    'JSON: {"a": [1, 2.5, null]}',
    "\u00e4\u00f6\u00fc \u2014 \u4f60\u597d \U0001f600",
    "1234567890 + 0.001",
)


def check_round_trip(context: Context) -> Iterator[Check]:
    """Is text that is encoded and decoded the same, and a reply that is written and parsed?"""
    tokenizer, chat = context.stack.tokenizer, context.stack.chat
    if tokenizer is None or chat is None:
        raise SkippedError("there is no tokenizer with a chat format to render with")
    lost = [text for text in TEXTS if tokenizer.decode(tokenizer.encode(text)) != text]
    wrong = [*(_misread(chat, text) for text in TEXTS), _misread_call(chat)]
    faults = [f"text {text!r} comes back otherwise" for text in lost] + [each for each in wrong if each]
    total = 2 * len(TEXTS) + 1
    yield check(
        "round_trip",
        "what is rendered is read back the same",
        "fail" if faults else "pass",
        "; ".join(faults[:3]) or f"{total} texts, replies and calls came back as they were written",
        figure=float(len(faults)),
        threshold=0.0,
        unit=f"of {total}",
        fix="use the tokenizer and chat template that the model was trained with (chat.format)",
    )


def check_prefix(context: Context) -> Iterator[Check]:
    """Does each turn's prompt begin with every token that was seen before, or say that it begins anew?"""
    chat = context.stack.chat
    if chat is None:
        raise SkippedError("there is no chat format to render with")
    broken: list[str] = []
    anew: list[str] = []
    turns = 0
    for topic in TOPICS[:3]:
        history = [Message("user", topic)]
        prompt = chat.start(history, (LOOKUP,))
        for number, answer in enumerate(ANSWERS):
            reply = _call(chat) if number == 0 else _answer(chat, "Well, " + topic)
            seen = (*prompt.token_ids, *chat.demonstrate(reply, True))
            history.append(reply)
            new = [Message("tool", "a plant", name="functions.lookup") if number == 0 else Message("user", answer)]
            prompt = chat.extend(seen, tuple(history), new, (LOOKUP,))
            history += new
            turns += 1
            if prompt.extends and prompt.token_ids[: len(seen)] != seen:
                broken.append(f"turn {number + 2} of {topic!r} says that it extends and does not")
            elif not prompt.extends:
                anew += prompt.dropped or (f"turn {number + 2} begins anew",)
    reason = "; ".join(broken[:3]) or f"{turns} prompts begin with every token that was seen before"
    if anew and not broken:
        reason = f"{turns - len(anew)} of {turns} prompts only add tokens; {len(anew)} begin anew and say so: {anew[0]}"
    yield check(
        "prefix",
        "later turns only add tokens",
        "fail" if broken else "pass",
        reason,
        figure=float(len(broken)),
        threshold=0.0,
        unit="turns",
        fix="a chat format must keep the drawn tokens: use Keel's, or mend its extend()",
        begin_anew=len(anew),
    )


def check_stop_tokens(context: Context) -> Iterator[Check]:
    """Are the stop tokens tokens, and the same to the chat format, the tokenizer and the generation config?"""
    stack = context.stack
    if stack.chat is None or stack.tokenizer is None:
        raise SkippedError("there is no chat format that names stop tokens")
    stops = stack.chat.stop_token_ids
    unknown = [stop for stop in stops if stop not in stack.tokenizer.known_ids or stop >= stack.trainer.info.vocab_size]
    configured = _ids(getattr(getattr(stack.trainer.model, "generation_config", None), "eos_token_id", None))
    eos = stack.tokenizer.eos_id
    foreign = bool(configured) and not set(configured) & set(stops)
    problem = ""
    if not stops:
        problem = "the chat format names no stop token, so only the length ends a reply"
    elif unknown:
        problem = f"stop tokens {unknown} are not in the vocabulary of tokenizer and model"
    elif eos is not None and eos not in stops and foreign:
        problem = f"the tokenizer ends with {eos}, the generation config with {list(configured)}, the chat with {stops}"
    names = ", ".join(stack.tokenizer.decode([stop]) for stop in stops if stop not in unknown)
    yield check(
        "stop_tokens",
        "stop tokens are known to all",
        "fail" if unknown or not stops else "warn" if problem else "pass",
        problem or f"a reply ends with {names}; the generation config's are {list(configured)}",
        fix="use the tokenizer and generation_config.json that belong to the model",
        stop_token_ids=list(stops),
        generation_config=list(configured),
    )


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _answer(chat: Chat, text: str) -> Message:
    return Message("assistant", text, channel="final" if isinstance(chat, HarmonyChat) else None)


def _call(chat: Chat) -> Message:
    harmony = isinstance(chat, HarmonyChat)
    return Message(
        "assistant",
        '{"word": "tree"}',
        channel="commentary" if harmony else None,
        recipient="functions.lookup",
        content_type="json" if harmony else None,
    )


def _misread(chat: Chat, text: str) -> str:
    """What is wrong with a reply that says `text`, written and parsed again; "" if nothing is."""
    faults = []
    for reply in _read_back(chat, _answer(chat, text)):
        if reply.malformed is None and reply.final is not None and reply.final.strip() == text.strip():
            return ""
        faults.append(f"a reply of {text!r} is read as {reply.final!r} ({reply.malformed or 'well formed'})")
    return faults[0]


def _misread_call(chat: Chat) -> str:
    faults = []
    for reply in _read_back(chat, _call(chat)):
        if [call.recipient for call in reply.calls] == ["functions.lookup"]:
            return ""
        faults.append(f"a call is read as {reply.text!r} ({reply.malformed or 'no call in it'})")
    return faults[0]


def _read_back(chat: Chat, message: Message) -> Iterator[Reply]:
    """The reply `message`, written and parsed: alone, and after thoughts, with which some templates begin a reply."""
    for before in ((), (Message("assistant", "Hm.", channel="analysis"),)):
        ids = [token for each in before for token in chat.demonstrate(each, False)]
        yield chat.parse([*ids, *chat.demonstrate(message, True)])
