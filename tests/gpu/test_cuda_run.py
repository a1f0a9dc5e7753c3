"""Small runs on a card: the invariants of the CPU hold, engine and learner agree, the same seed gives the same bits."""

from __future__ import annotations

import json

import pytest
import torch

from keel.build import build_sampler
from keel.loop import resume, train
from keel.rollouts.store import read_step_record

pytestmark = pytest.mark.gpu

# Means over drawn tokens: float32 rounding alone, and what bfloat16's eight bits leave.
MISMATCH = {"float32": 1e-5, "bfloat16": 5e-2}


def steps_of(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "step"]


def measured_apart(row):
    return {name: value for name, value in row.items() if not name.endswith(("_s", "_mib", "/mfu"))}


def small(make_config, run_dir, preset, dtype, **sections):
    model = {"dtype": dtype, **sections.pop("model", {})}
    config = make_config(run_dir, preset, device="cuda", steps=3, warm_start={"steps": 5}, **sections)
    return config.model_copy(update={"model": config.model.model_copy(update=model)})


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_invariants_hold(tmp_path, make_config, preset, dtype):
    train(small(make_config, tmp_path / "run", preset, dtype))
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 8
    assert {row["policy/ratio_max_dev"] for row in steps} == {0.0}
    assert {row["policy/recompute_max_dev"] for row in steps} == {0.0}
    drawn = [row for row in steps if "mismatch/abs_mean" in row]
    assert drawn
    assert all(row["mismatch/abs_mean"] < MISMATCH[dtype] for row in drawn)
    assert all(row["mismatch/k3"] >= 0 for row in drawn)
    assert all(row["memory/learn_peak_mib"] > 0 and row["memory/allocated_mib"] > 0 for row in steps)
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert recorded["device"].startswith("cuda (")
    _, header = read_step_record(tmp_path / "run" / "steps" / "000000.safetensors")
    assert header["cuda_random_state"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_bits(tmp_path, make_config, dtype):
    for name in ("one", "other"):
        train(small(make_config, tmp_path / name, "gpt_oss", dtype))
    one, other = (list(map(measured_apart, steps_of(tmp_path / name))) for name in ("one", "other"))
    assert [{**row, "unix_s": 0} for row in one] == [{**row, "unix_s": 0} for row in other]


def test_keys_and_values_are_not_held_while_the_learner_learns(tmp_path, make_config):
    peaks = {}
    for free_cache in ("auto", "off"):
        engine = {"slots": 256, "max_sequence_tokens": 2048, "free_cache": free_cache}
        train(small(make_config, tmp_path / free_cache, "qwen3", "bfloat16", engine=engine))
        peaks[free_cache] = steps_of(tmp_path / free_cache)[-1]
    freed, kept = peaks["auto"], peaks["off"]
    assert freed["memory/key_values_mib"] == kept["memory/key_values_mib"] > 50
    spared = kept["memory/allocated_mib"] - freed["memory/allocated_mib"]
    assert spared == pytest.approx(freed["memory/key_values_mib"], rel=0.05)


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3"])
def test_the_shape_of_the_lora_recipes(tmp_path, make_config, preset):
    """bfloat16, checkpointed layers, an adapter on all that the model has, the cache freed, truncated weights."""
    lora = {"rank": 4, "alpha": 8}
    config = make_config(
        tmp_path / "run",
        preset,
        device="cuda",
        steps=3,
        model={
            "tiny": {"preset": preset, "vocab_size": 500, "options": {"num_hidden_layers": 2}},
            "dtype": "bfloat16",
            "gradient_checkpointing": True,
            "lora": lora,
        },
        algo={"correction": "token_truncated"},
    )
    train(config)
    steps = steps_of(tmp_path / "run")
    assert {row["policy/ratio_max_dev"] for row in steps} == {0.0}
    assert {row["policy/recompute_max_dev"] for row in steps} == {0.0}
    assert all(row["mismatch/abs_mean"] < MISMATCH["bfloat16"] for row in steps)


def test_a_run_resumes_on_the_card(tmp_path, make_config):
    whole = small(make_config, tmp_path / "whole", "gpt_oss", "float32")
    train(whole)
    part = small(make_config, tmp_path / "part", "gpt_oss", "float32", checkpoint={"every": 1, "keep": 2})
    train(part.model_copy(update={"steps": 1}))
    config_file = tmp_path / "part" / "config.toml"
    config_file.write_text(config_file.read_text().replace("\nsteps = 1 ", "\nsteps = 3 ", 1))
    resume(tmp_path / "part")
    assert steps_of(tmp_path / "part")[-1]["policy/loss"] == steps_of(tmp_path / "whole")[-1]["policy/loss"]


def test_sampling_alone_runs_on_the_card(tmp_path, make_config):
    config = small(make_config, tmp_path / "run", "gpt_oss", "bfloat16", eval={"num_tasks": 4})
    with build_sampler(config, None) as collector:
        held_out = collector.tasks("eval")
        done = collector.collect_eval([held_out[0], held_out[1]], temperature=1.0, seed=0)
    assert len(done) == 2
    assert torch.cuda.max_memory_allocated() > 0
