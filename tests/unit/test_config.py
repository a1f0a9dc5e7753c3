"""Every option is documented, defaults are possible, and impossible combinations cannot be constructed."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from keel.config import Plugin, TrainConfig
from keel.config_schema import tables


def test_every_option_and_section_has_help():
    for table in tables():
        assert table.path == () or table.help, table.path
        for option in table.options:
            assert option.help, option.name


def test_options_are_listed_once_and_completely():
    names = [option.name for table in tables() for option in table.options]
    assert len(names) == len(set(names))
    flat = TrainConfig().model_dump()

    def leaves(value, path=()):
        for key, inner in value.items():
            is_section = isinstance(inner, dict) and (*path, key) in {table.path for table in tables()}
            if is_section:
                yield from leaves(inner, (*path, key))
            else:
                yield ".".join((*path, key))

    assert sorted(names) == sorted(leaves(flat))


def test_a_section_inside_another_keeps_its_own_default():
    config = TrainConfig.model_validate({"warm_start": {"optim": {"beta1": 0.8}}})
    assert config.warm_start.optim.lr == TrainConfig().warm_start.optim.lr != config.optim.lr


def test_a_plugin_can_be_a_bare_name():
    config = TrainConfig.model_validate(
        {"algo": {"loss": "reinforce", "correction": {"id": "token_truncated", "cap": 3.0}}}
    )
    assert config.algo.loss == Plugin(id="reinforce")
    assert config.algo.correction[0].options == {"cap": 3.0}


IMPOSSIBLE = [
    ({"rollout": {"max_new_tokens": 64, "max_sequence_tokens": 64}}, "no room for a prompt"),
    ({"engine": {"max_sequence_tokens": 100}}, "shorter than the rollout's"),
    ({"rollout": {"top_k": 1}}, "one token is left"),
    ({"model": {"router": {"frozen": True}, "lora": {"rank": 4}}}, "routers that are to stay"),
    ({"model": {"router": {"dtype": "float32"}, "dtype": "bfloat16"}, "engine": {"id": "vllm"}}, "model's own type"),
    ({"rollout": {"temperature": 0.0}}, "greedy attempts"),
    ({"rollout": {"group_size": 1}}, "single attempt"),
    ({"rollout": {"max_staleness": 1}}, "never behind"),
    ({"algo": {"updates_per_batch": 300}}, "more optimizer steps"),
    (
        {"algo": {"updates_per_batch": 2}, "rollout": {"max_staleness": 1}, "engine": {"process": "separate"}},
        "more than max_staleness allows",
    ),
    ({"algo": {"loss": {"id": "cross_entropy"}}}, "ignores rewards"),
    ({"eval": {"every": 5}}, "on no tasks"),
    ({"model": {"path": "somewhere", "tiny": {"preset": "qwen3"}}}, "two models to start from"),
    ({"steps": 10, "optim": {"warmup_steps": 11}}, "never finish warming up"),
    ({"warm_start": {"steps": 5, "optim": {"warmup_steps": 6}}}, "never finish warming up"),
]


@pytest.mark.parametrize(("values", "message"), IMPOSSIBLE, ids=[message for _, message in IMPOSSIBLE])
def test_impossible_combinations_cannot_be_constructed(values, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate(values)


@pytest.mark.parametrize(
    "values",
    [
        {"rollout": {"max_new_tokens": 63, "max_sequence_tokens": 64}},
        {"steps": 0, "rollout": {"top_p": 0.9, "top_k": 20, "temperature": 0.0, "group_size": 1}},
        {"rollout": {"max_staleness": 1}, "engine": {"process": "separate"}},
        {"algo": {"updates_per_batch": 2}, "rollout": {"max_staleness": 2}, "engine": {"process": "separate"}},
        {"rollout": {"group_size": 1}, "algo": {"advantage": {"id": "mine:advantage"}}},
        {"algo": {"updates_per_batch": 256}},
        {"eval": {"every": 5, "num_tasks": 1}},
        {"steps": 10, "optim": {"warmup_steps": 10}},
        {"warm_start": {"steps": 0, "optim": {"warmup_steps": 6}}},
    ],
)
def test_their_neighbours_can(values):
    TrainConfig.model_validate(values)


def test_options_are_frozen():
    with pytest.raises(ValidationError):
        TrainConfig().seed = 3
