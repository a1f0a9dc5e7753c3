"""What the tokenizer of a small model learns its words from."""

from __future__ import annotations

import pytest

import keel
from keel.chat.tokenizer import load_tokenizer
from keel.config import TrainConfig
from keel.envs.base import Demonstration, NoDemonstrationsError
from keel.tiny_start import build_tiny_start, texts_to_learn

QUESTION = "How many nightingales sing in Zwischbergen?"
ANSWER = "seventeen nightingales"


class Asking(keel.Env):
    """Tasks without demonstrations; `reset` is async, as one that calls a server."""

    made = closed = 0

    def __init__(self):
        Asking.made += 1

    def tasks(self, split):
        return [keel.Task(str(n), {"question": QUESTION, "secret": ANSWER, "n": n}) for n in range(40)]

    async def reset(self, task):
        return [keel.Message("user", task.data["question"])]

    def close(self):
        Asking.closed += 1


class Showing(Asking):
    def demonstrations(self, count, *, seed, start):
        reply = (keel.Message("assistant", "eleven larks", channel="final"),)
        return [Demonstration(self.tasks("train")[0], (reply,))] * count

    def step(self, reply):
        return keel.Step(done=True)


def config(**values):
    tiny = {"preset": "gpt_oss", "vocab_size": 400, "options": {"num_hidden_layers": 2}}
    return TrainConfig.model_validate({"model": {"tiny": tiny}, "chat": {"system_message": "none"}, **values})


def test_without_demonstrations_words_are_those_of_the_tasks(tmp_path):
    """Prompts as they are rendered, and the texts of the rows, in which the answers stand."""
    build_tiny_start(config(), Asking, tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    assert len(tokenizer.encode(QUESTION)) < 8
    assert len(tokenizer.encode(ANSWER)) < 8
    assert len(tokenizer.encode("quizzically jumping foxes")) > 15
    assert Asking.closed == Asking.made > 0


def test_a_warm_start_needs_demonstrations():
    with pytest.raises(NoDemonstrationsError, match="Asking has no demonstrations"):
        list(texts_to_learn(config(warm_start={"steps": 1}), Asking, "harmony"))


def test_demonstrations_come_first():
    texts = set(texts_to_learn(config(), Showing, "harmony"))
    assert QUESTION in texts
    assert "eleven larks" in texts
    assert ANSWER not in texts
