"""Whatever is drawn, reading it gives a Reply: with its one fault named, or with a call or an answer in it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.types import Message

GOLDEN_REPLIES = json.loads(
    (Path(__file__).parents[2] / "golden" / "harmony" / "replies.json").read_text(encoding="utf-8")
)["drawn"]

MALFORMED = [
    ("", "empty reply", 0),
    ("<|channel|>final", "cut off inside a message's header", 0),
    ("<|channel|>final<|message|>4", "cut off inside a message's content", 1),
    ("<|channel|>analysis<|message|>x<|end|>", "cut off after a message, without a call or an answer", 1),
    ("<|channel|>analysis<|message|>x<|end|><|start|>", "cut off inside a message's header", 1),
    ("<|channel|>analysis<|message|>x<|return|>", "the reply ends on channel analysis, without a call or an answer", 1),
    ("<|channel|>commentary<|message|>x<|return|>", "the reply ends on channel commentary", 1),
    ("<|channel|>final<|message|>x<|call|>", "a message on channel final ended by '<|call|>'", 1),
    ("<|channel|>commentary to=f<|message|>x<|return|>", "a call ended by '<|return|>'", 1),
    ("<|channel|>commentary to=f<|message|>x<|end|>", "a call ended by '<|end|>'", 1),
    ("<|channel|>final<|message|>a<|start|>assistant", "'<|start|>' at 5 inside a message's content", 0),
    ("<|channel|>final<|message|>a<|endoftext|>", "'<|endoftext|>' at 5 inside a message's content", 0),
    ("<|channel|>final<|end|>", "'<|end|>' at 3 inside a message's header", 0),
    ("<|channel|>final<|message|>a<|return|>b", "tokens after the '<|return|>' at 5", 1),
    ("<|channel|>analysis<|message|>a<|end|>b", "between messages, where only <|start|> may be", 1),
    ("<|message|>a<|return|>", "0 channels in the header at 0", 0),
    ("<|channel|>final<|channel|>final<|message|>a<|return|>", "2 channels", 0),
    ("<|channel|><|message|>a<|return|>", "no channel name", 0),
    ("<|channel|>thoughts<|message|>a<|return|>", "channel 'thoughts'", 0),
    ("<|channel|>commentary to=a to=b<|message|>x<|call|>", "two recipients", 0),
    (" to=a<|channel|>commentary to=a<|message|>x<|call|>", "two recipients", 0),
    ("<|channel|>commentary to=<|message|>x<|call|>", "an empty recipient", 0),
    ("<|channel|>final to=f<|message|>x<|call|>", "a call on the final channel", 0),
    ("<|channel|>commentary to=f json now<|message|>x<|call|>", "a stray 'now'", 0),
    ("<|channel|>commentary to=f code<|constrain|>json<|message|>x<|call|>", "a stray 'code'", 0),
    ("<|channel|>commentary to=f <|constrain|><|message|>x<|call|>", "no content type", 0),
    ("<|constrain|>json<|channel|>final<|message|>x<|return|>", "a misplaced <|constrain|>", 0),
    ("user<|channel|>final<|message|>x<|return|>", "role 'assistantuser'", 0),
    ("<|channel|>analysis<|message|>x<|end|><|start|>user<|channel|>final<|message|>x<|return|>", "role 'user'", 1),
    ("<|channel|>analysis<|message|>x<|end|><|start|><|channel|>final<|message|>x<|return|>", "no role", 1),
]


@pytest.mark.parametrize(("text", "reason", "read"), MALFORMED)
def test_malformed_reply_names_its_fault_and_keeps_what_was_read(text, reason, read, harmony, spell):
    reply = harmony.parse(spell(text))
    assert reply.malformed is not None
    assert reason in reply.malformed or _without_position(reason) in _without_position(reply.malformed)
    assert len(reply.messages) == read
    assert reply.final is None
    assert reply.text == text


def _without_position(reason: str) -> str:
    return "".join(letter for letter in reason if not letter.isdigit())


def test_ids_outside_the_vocabulary_are_malformed(harmony, spell):
    good = spell("<|channel|>final<|message|>4<|return|>")
    for stranger in (-1, 10**12, len(harmony.tokenizer.known_ids), 2**31):
        reply = harmony.parse([*good[:4], stranger, *good[4:]])
        assert reply.malformed == f"token {stranger} at 4 is not in the vocabulary"
        assert "\ufffd" in reply.text


def test_bytes_that_are_not_text_are_read_and_not_malformed(harmony, spell, harmony_tokenizer):
    half = harmony_tokenizer.convert_tokens_to_ids("Ã")  # the byte 0xC3, which begins a character of two
    reply = harmony.parse([*spell("<|channel|>final<|message|>"), half, *spell("<|return|>")])
    assert reply.malformed is None
    assert reply.final == "\ufffd"


def test_recipient_is_read_from_either_part_of_the_header(harmony, spell):
    expected = Message("assistant", "{}", "commentary", "functions.f", content_type="json")
    for text in (
        " to=functions.f<|channel|>commentary json<|message|>{}<|call|>",
        " to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
        "<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|call|>",
    ):
        reply = harmony.parse(spell(text))
        assert reply.malformed is None
        assert reply.calls == (expected,)
        again = harmony.parse(spell("<|channel|>analysis<|message|>.<|end|><|start|>assistant" + text))
        assert again.malformed is None
        assert again.messages[1] == expected


def _holds(harmony, ids):
    """What is true of any reply."""
    reply = harmony.parse(ids)
    assert isinstance(reply.text, str)
    assert all(message.role == "assistant" for message in reply.messages)
    if reply.malformed is not None:
        assert reply.malformed
        assert "\n" not in reply.malformed
        assert len(reply.malformed) < 200
        assert reply.final is None
        return
    assert bool(reply.calls) != (reply.final is not None), "neither or both of call and answer"
    drawn: list[int] = []
    for place, message in enumerate(reply.messages):
        drawn += harmony.demonstrate(message, last=place == len(reply.messages) - 1)
    assert harmony.parse(drawn) == type(reply)(reply.messages, harmony.tokenizer.decode(drawn))


def _mutate(draw: random.Random, ids: list[int], vocabulary: list[int], special: list[int]) -> list[int]:
    changed = list(ids)
    for _ in range(draw.randint(1, 4)):
        place = draw.randint(0, len(changed))
        kind = draw.randrange(6)
        if kind == 0:
            changed = changed[:place]
        elif kind == 1 and changed:
            del changed[min(place, len(changed) - 1)]
        elif kind == 2:
            changed.insert(place, draw.choice(special))
        elif kind == 3:
            changed.insert(place, draw.choice(vocabulary))
        elif kind == 4:
            changed.insert(place, draw.choice([-1, 2**40, len(vocabulary) + 7]))
        else:
            other = draw.randint(0, len(changed))
            changed[place:place] = changed[min(place, other) : max(place, other)][:12]
    return changed


def test_ten_thousand_random_and_mutated_sequences(harmony, spell):
    draw = random.Random(20250805)
    goldens = [spell(text) for text in GOLDEN_REPLIES]
    vocabulary, special = sorted(harmony.tokenizer.known_ids), sorted(harmony.tokenizer.special_ids)
    well_formed = 0
    for _ in range(8_000):
        ids = _mutate(draw, draw.choice(goldens), vocabulary, special)
        _holds(harmony, ids)
        well_formed += harmony.parse(ids).malformed is None
    assert 200 < well_formed < 6_000, "the mutations are too tame or too wild to say much"
    for _ in range(2_000):
        pool = draw.choice([special, vocabulary, special + vocabulary[:40]])
        _holds(harmony, [draw.choice(pool) for _ in range(draw.randint(0, 24))])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_sequence_of_structure_and_words_is_read(data, harmony, spell):
    pieces = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>", "<|return|>", "<|constrain|>"]
    words = ["assistant", "final", "analysis", "commentary", " to=", "functions.f", " json", "x", " ", "<|endoftext|>"]
    drawn = data.draw(st.lists(st.sampled_from(pieces + words), max_size=20))
    _holds(harmony, spell("".join(drawn)))
