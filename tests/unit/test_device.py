"""Which device a name means, on machines with and without cards; what memory is told."""

from __future__ import annotations

import os

import psutil
import pytest
import torch
from pydantic import ValidationError

from keel import config_load
from keel.config import TrainConfig
from keel.config_problems import ConfigError
from keel.device import (
    MemoryWatch,
    choose_devices,
    describe_device,
    frees_cache,
    resolve_device,
    seen_device,
    total_bytes,
)
from keel.loop import train
from keel.monitor.memory import machine_bytes, resident_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_cards", "expected"),
    [
        ("auto", 1, 0, ["cpu"]),
        ("auto", 2, 0, ["cpu", "cpu"]),
        ("auto", 1, 4, ["cuda:0"]),
        ("auto", 3, 4, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cpu", 2, 4, ["cpu", "cpu"]),
        ("cuda", 1, 1, ["cuda:0"]),
        ("cuda", 4, 4, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        ("cuda:3", 1, 4, ["cuda:3"]),
    ],
)
def test_a_name_and_the_cards_there_are_decide_the_devices(name, num_ranks, num_cards, expected):
    assert choose_devices(name, num_ranks, num_cards) == tuple(map(torch.device, expected))


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_cards", "message"),
    [
        ("cuda", 1, 0, r'is asked for and not there: .*\n.*got: "cuda".*\n.*set device = "cpu"'),
        ("cuda:1", 1, 0, "cuda:1 is asked for and not there"),
        ("cuda:4", 1, 4, "need 5 cards, torch sees 4"),
        ("cuda", 5, 4, r"5 learner rank\(s\) from card 0 on need 5 cards"),
        ("auto", 2, 1, "need 2 cards, torch sees 1"),
    ],
)
def test_a_card_that_is_not_there_is_an_error_and_never_the_cpu(name, num_ranks, num_cards, message):
    with pytest.raises(ConfigError, match=message):
        choose_devices(name, num_ranks, num_cards)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CUDA", "cuda:-1", "mps", ""])
def test_other_names_are_refused_by_the_config(name):
    with pytest.raises(ValidationError):
        TrainConfig(device=name)
    with pytest.raises(ConfigError, match=r"device has a value it does not take[^$]*'cuda:1'"):
        config_load.parse(f'device = "{name}"')


def test_several_ranks_on_one_named_card_are_refused():
    with pytest.raises(ValidationError, match="several learner ranks on one named card"):
        TrainConfig(device="cuda:1", learner={"ranks": 2})


@pytest.mark.parametrize(
    ("wanted", "device", "max_staleness", "expected"),
    [
        ("auto", "cuda:0", 0, True),
        ("auto", "cuda:0", 1, False),
        ("auto", "cpu", 0, False),
        ("on", "cpu", 0, True),
        ("off", "cuda:0", 0, False),
    ],
)
def test_when_the_engine_gives_its_cache_back(wanted, device, max_staleness, expected):
    config = TrainConfig(engine={"free_cache": wanted, "process": "separate"}, rollout={"max_staleness": max_staleness})
    assert frees_cache(config, torch.device(device)) is expected


def test_giving_back_what_is_in_use_is_refused():
    with pytest.raises(ValidationError, match="samples while the learner learns"):
        TrainConfig(engine={"free_cache": "on", "process": "separate"}, rollout={"max_staleness": 1})


def test_without_a_card_a_run_on_one_leaves_nothing_behind(tmp_path, make_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    assert seen_device("cuda") is None
    with pytest.raises(ConfigError, match="cuda is asked for and not there"):
        train(make_config(tmp_path / "run", device="cuda"))
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_read_leaves_nothing_behind(tmp_path, make_config):
    with pytest.raises(ConfigError, match=r"model\.path"):
        train(make_config(tmp_path / "run", model={"path": str(tmp_path)}))
    assert not (tmp_path / "run").exists()


def test_memory_on_a_cpu_is_the_machines_and_the_process():
    assert describe_device(CPU) == "cpu"
    assert 0 < resident_bytes() < machine_bytes() <= psutil.virtual_memory().total
    assert total_bytes(CPU) == machine_bytes()
    watch = MemoryWatch(CPU, 3 * 2**20)
    watch.lap("rollout")
    block = bytearray(os.urandom(1)) * (64 * 2**20)
    told = watch.total()
    assert told.keys() == {"memory/key_values_mib", "memory/resident_mib"}
    assert told["memory/key_values_mib"] == 3
    assert told["memory/resident_mib"] >= len(block) / 2**20
