"""Whole runs with an adapter: exact on every step, resumed without a trace, evaluated from their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from keel.build import build_sampler
from keel.evaluation import measure_tasks
from keel.loop import resume, train
from keel.models import policy
from keel.runs import load_run

LORA = {"rank": 4, "alpha": 16}


def section(path: Path, make_config, base: str):
    return make_config(
        path,
        model={"path": base, "lora": LORA},
        steps=3,
        algo={"kl": {"coefficient": 0.05}, "entropy_coefficient": 0.01},  # a gradient whatever the rewards
        optim={"lr": 1e-2},
        checkpoint={"every": 1, "keep": 2},
        eval={"num_tasks": 8},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, make_config, warm_weights) -> Path:
    path = tmp_path_factory.mktemp("lora") / "undisturbed"
    train(section(path, make_config, warm_weights("gpt_oss")))
    return path


def adapter(path: Path):
    return load_file(load_run(path).weights() / "adapter_model.safetensors")


def timeless(rows):
    dropped = ("seconds", "memory/resident_mib", "perf/mfu")
    return [{k: v for k, v in row.items() if not k.endswith("_s") and k not in dropped} for row in rows]


def test_every_step_is_exact_and_the_penalty_begins_at_nothing(undisturbed):
    rows = load_run(undisturbed).rows_of("step")
    assert [row["policy/ratio_max_dev"] for row in rows] == [0.0] * 3
    assert [row["policy/recompute_max_dev"] for row in rows] == [0.0] * 3
    assert all(row["mismatch/abs_max"] < 1e-5 for row in rows)
    assert rows[0]["policy/kl"] == 0.0  # a fresh adapter is its base, to the bit
    assert rows[1]["policy/kl"] > 0.0


def test_a_checkpoint_is_evaluated_as_the_run_was(undisturbed, make_config, tmp_path):
    """The base is found through the adapter's own file; draws are the same, so is every outcome."""
    run = load_run(undisturbed)
    weights = run.weights()
    assert json.loads((weights / "adapter_config.json").read_text())["base_model_name_or_path"] == run.config.model.path
    assert not (weights / "config.json").exists()
    config = make_config(tmp_path / "unused", model={"path": str(weights)}, eval={"num_tasks": 8})
    with build_sampler(config, None) as collector:
        found = measure_tasks(collector, config.eval).metrics
    final = run.evaluations[-1]
    assert final["name"] == "final"
    assert {name: found[name] for name in ("success", "reward", "tokens", "turns")} == {
        name: final[name] for name in ("success", "reward", "tokens", "turns")
    }


def test_broken_in_the_midst_of_a_checkpoint_and_resumed(undisturbed, tmp_path, make_config, warm_weights, monkeypatch):
    """The second checkpoint's adapter is half written when its process fails; the run still ends with the same bits."""
    calls = []

    def failing(model, adapter, path, parameters=None):
        calls.append(path)
        if len(calls) == 2:
            Path(path, "adapter_model.safetensors").write_bytes(b"half")
            raise RuntimeError("the power went")
        return whole(model, adapter, path, parameters)

    whole = policy.save_adapter
    monkeypatch.setattr(policy, "save_adapter", failing)
    with pytest.raises(RuntimeError, match="the power went"):
        train(section(tmp_path / "run", make_config, warm_weights("gpt_oss")))
    assert [path.name for path in load_run(tmp_path / "run").checkpoints] == ["000001"]
    resume(tmp_path / "run")
    found, expected = adapter(tmp_path / "run"), adapter(undisturbed)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    both = [timeless(load_run(path).rows) for path in (tmp_path / "run", undisturbed)]
    assert both[0] == both[1]
