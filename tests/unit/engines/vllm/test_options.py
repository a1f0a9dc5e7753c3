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


WALKED_AROUND = """
--hos --hos=0.0.0.0 --logprobs-mod=raw_logprobs --logprobs_mod=raw_logprobs --no-enf --no-enable -tp -tp=2 -t --config
--conf --no-enable-scale-out --no_enable_scale_out --no-skip-tok --hf-overrides.layers --hf_overrides.layers=1
--data-parallel-size --data_parallel -dp --enable-lora --enable_lo --logits-processors --logits_proc=a.B
--speculative-config -sc --speculative_config.method=ngram --spec-model --
"""


@pytest.mark.parametrize("argument", WALKED_AROUND.split())
def test_what_keel_sets_is_not_set_by_a_shorter_or_another_name(argument: str) -> None:
    with pytest.raises(ValidationError, match=r"short for.*leave it out, or attach to a server by url") as caught:
        make(vllm={"args": [argument, "2"]})
    assert repr(argument) in str(caught.value)


def test_other_arguments_are_passed_on() -> None:
    short = ("--block-size", "32", "--seed", "-1", "--max-num-batched-tokens=4096", "-q", "fp8")
    longer = ("--model-impl", "vllm", "--config-format=hf", "--enable-sleep-mode", "--compilation-config.mode=0")
    assert make(vllm={"args": short + longer}).engine.vllm.args == short + longer
