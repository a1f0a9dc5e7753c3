"""What cannot be had with vLLM is refused when the config is read, with what to do."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from keel.config import TrainConfig


def make(engine: dict[str, Any] | None = None, vllm: dict[str, Any] | None = None, **sections: Any) -> TrainConfig:
    return TrainConfig.model_validate({"engine": {"id": "vllm", "vllm": vllm or {}, **(engine or {})}, **sections})


URL = "http://127.0.0.1:8000"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("two processes", {"engine": {"process": "separate"}}, "a process of its own already"),
    ("training a stranger", {"vllm": {"url": URL}}, "allow_weight_push = true"),
    (
        "arguments of a stranger",
        {"vllm": {"url": URL, "allow_weight_push": True, "args": ["--seed=1"]}},
        "somebody else",
    ),
    ("top-p alone", {"rollout": {"top_p": 0.9}}, r"set rollout.top_k to 1 \.\.\. 52"),
    ("too many", {"rollout": {"top_k": 53}}, "engine.vllm.max_logprobs"),
    ("too hot", {"rollout": {"temperature": 2.5}}, "from 0.01 to 2.0"),
    ("too cold", {"eval": {"temperature": 0.001}}, "from 0.01 to 2.0"),
]


@pytest.mark.parametrize(("given", "told"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_an_impossible_combination_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        make(**given)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"vllm": {"url": URL, "allow_weight_push": True}},
        {"vllm": {"url": URL}, "steps": 0},
        {"rollout": {"top_p": 0.9, "top_k": 52}},
        {"rollout": {"top_k": 100}, "vllm": {"max_logprobs": 112}},
        {"rollout": {"top_p": 0.9}, "steps": 0},
        {"eval": {"temperature": 0.0}},
    ],
)
def test_a_possible_one_is_taken(given: dict[str, Any]) -> None:
    assert make(**given).engine.id == "vllm"


def test_other_engines_are_left_alone() -> None:
    assert TrainConfig.model_validate({"rollout": {"temperature": 2.5}}).rollout.temperature == 2.5
