"""`keel export`: what is written is plain Hugging Face and PEFT, whole or absent; no text of a run forges its card."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from keel.cli import app
from keel.config import EngineConfig
from keel.engines.base import GenerateRequest
from keel.engines.embedded.engine import EmbeddedEngine
from keel.export import ExportError, export_run
from keel.export_card import as_text
from keel.export_push import PushFailedError, PushRefusedError
from keel.loop import train
from keel.models.policy import PolicyModel
from keel.runs import load_run
from keel.types import SamplingSettings

ROOT = Path(__file__).parents[2]
SMALL = {"groups_per_step": 1, "group_size": 4, "max_new_tokens": 8, "max_turns": 1}
LENGTH = 24


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_config):
    """`runs(kind)`: a run of full weights (qwen3) or with an adapter (gpt_oss), two steps long."""
    made = {}

    def build(kind):
        if kind not in made:
            run_dir = tmp_path_factory.mktemp("run") / kind
            preset = "qwen3" if kind == "full" else "gpt_oss"
            tiny = {"preset": preset, "vocab_size": 500, "options": {"num_hidden_layers": 2}}
            model = {"tiny": tiny} | ({"lora": {"rank": 4, "alpha": 16}} if kind == "lora" else {})
            warm = {"steps": 2, "demonstrations_per_step": 4, "optim": {"lr": 3e-2}}
            train(
                make_config(
                    run_dir, preset, steps=1, model=model, rollout=SMALL, warm_start=warm, eval={"num_tasks": 2}, seed=7
                )
            )
            made[kind] = run_dir
        return made[kind]

    return build


def greedy_of_engine(weights, prompt):
    engine = EmbeddedEngine(PolicyModel.load(weights), EngineConfig(slots=2), max_sequence_tokens=96)
    request = GenerateRequest("r", "", prompt, SamplingSettings(0.0), LENGTH, (), 0)
    return list(asyncio.run(engine.generate(request)).token_ids)


def greedy_of_transformers(path, prompt):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = torch.tensor([prompt])
    drawn = model.generate(tokens, do_sample=False, max_new_tokens=LENGTH, min_new_tokens=LENGTH, eos_token_id=-1)
    return drawn[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("kind", "merged"), [("full", None), ("lora", None), ("lora", True)])
def test_plain_transformers_generates_what_the_engine_would(runs, tmp_path, kind, merged):
    run = load_run(runs(kind))
    done = export_run(run, out=tmp_path / "out", merged=merged)
    assert done.path == tmp_path / "out"
    assert done.kind == {("full", None): "weights", ("lora", None): "adapter", ("lora", True): "merged"}[kind, merged]
    prompt = tuple(range(20, 50))
    assert greedy_of_transformers(done.path, prompt) == greedy_of_engine(run.weights(), prompt)
    assert (
        AutoTokenizer.from_pretrained(done.path).get_vocab() == AutoTokenizer.from_pretrained(run.weights()).get_vocab()
    )
    generation = GenerationConfig.from_pretrained(done.path)
    assert (generation.do_sample, generation.temperature, generation.top_k, generation.top_p) == (True, 1.0, 0, 1.0)
    names = {file.name for file in done.path.iterdir()}
    assert ("adapter_config.json" in names) == (done.kind == "adapter")
    assert ("config.json" in names) == (done.kind != "adapter")


def test_a_merged_export_has_the_bases_tensors_and_stops_where_the_run_did(runs, tmp_path):
    done = export_run(runs("lora"), out=tmp_path / "out", merged=True)
    ours, theirs = (load_file(path / "model.safetensors") for path in (done.path, runs("lora") / "model"))
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    changed = {name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])}
    adapted = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "gate_up_proj", "down_proj")
    assert changed == {name for name in theirs if name.endswith((*adapted, "router.weight"))}
    tokenizer = AutoTokenizer.from_pretrained(done.path)
    stops = set(GenerationConfig.from_pretrained(done.path).eos_token_id)
    assert stops == set(tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"]))


def test_a_chat_template_travels(runs, tmp_path):
    done = export_run(runs("full"), out=tmp_path / "out")
    shown = AutoTokenizer.from_pretrained(done.path).apply_chat_template(
        [{"role": "user", "content": "7 * 6?"}], tokenize=False, add_generation_prompt=True
    )
    assert "7 * 6?" in shown
    assert shown.endswith("assistant\n")


@pytest.mark.parametrize(("kind", "merged"), [("full", None), ("lora", False), ("lora", True)])
def test_dtype_is_that_of_the_tensors(runs, tmp_path, kind, merged):
    done = export_run(runs(kind), out=tmp_path / "out", merged=merged, dtype="bfloat16")
    (file,) = done.path.glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(done.path, dtype="auto")
    if kind == "full" or merged:
        assert model.dtype == torch.bfloat16
        whole = AutoModelForCausalLM.from_pretrained(export_run(runs(kind), out=tmp_path / "32", merged=merged).path)
        ours, theirs = model.state_dict(), whole.state_dict()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor.to(torch.bfloat16)) or (ours[name] - tensor).abs().max() < 2e-2


def test_nothing_is_overwritten_and_a_default_place_is_found(runs, tmp_path):
    run = load_run(runs("full"))
    (tmp_path / "there").mkdir()
    with pytest.raises(ExportError, match=r"there exists, and nothing is overwritten; choose another --out"):
        export_run(run, out=tmp_path / "there")
    with pytest.raises(ExportError, match=r"holds whole weights: the run trained no adapter"):
        export_run(run, merged=False)
    with pytest.raises(ExportError, match=r"got 'int8'; known: float32, bfloat16, float16"):
        export_run(run, dtype="int8")
    done = export_run(run, checkpoint="3")
    assert done.path == run.path / "export" / "000003"
    with pytest.raises(ExportError, match="nothing is overwritten"):
        export_run(run, checkpoint=3)


def test_a_kill_leaves_no_half_directory(runs, tmp_path):
    """Killed outright while the card is written, after the tensors; then exported again to the same place."""
    code = f"""
import os, signal, sys
import keel.export
keel.export.model_card = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
keel.export.export_run({str(runs("lora"))!r}, out={str(tmp_path / "out")!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [item.name for item in tmp_path.iterdir()] == ["out.unfinished"]
    again = export_run(runs("lora"), out=tmp_path / "out")
    assert (again.path / "README.md").is_file()
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_an_error_leaves_nothing(runs, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr("keel.export.model_card", broken)
    with pytest.raises(OSError, match="no space left"):
        export_run(runs("full"), out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_card_says_what_was_measured(runs, tmp_path):
    run = load_run(runs("lora"))
    text = (export_run(run, out=tmp_path / "out").path / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    assert card.data.base_model is None  # a directory of this machine is nobody's business
    assert str(run.path) not in text
    final = next(row for row in run.evaluations if row["name"] == "final")
    assert f"{100 * final['success']:.1f} % ({100 * final['success_low']:.1f} % to" in text
    assert "| ratio exactly 1 | 3 of 3 steps |" in text
    assert "| seed | 7 |" in text
    assert "| training steps | 3 |" in text
    assert "rank 4, alpha 16" in text


HOSTILE = (
    "x\n---\nlicense: mit\n---\n# forged",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "[click](javascript:alert(1)) ![i](http://e.x/p.png) `code` | cell | * _em_ ~~s~~ @user #1",
    "\x1b[2J\u202egnp.exe\u2066",
    "{{ 7*7 }} ${HOME} &lt;b&gt; &#60;b&#62;",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_stays_text_in_the_card(runs, tmp_path, text):
    """A run directory is written by whoever wrote it: name, environment and evaluations' names are forged here."""
    copy = tmp_path / "run"
    shutil.copytree(runs("full"), copy)
    config = (copy / "config.toml").read_text()
    lines = [
        f"{line.split(' = ')[0]} = {json.dumps(text)}" if line.startswith(("name = ", 'id = "CalculatorEnv')) else line
        for line in config.splitlines()
    ]
    (copy / "config.toml").write_text("\n".join(lines) + "\n")
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"name": text} if row["kind"] == "eval" else row for row in rows]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = (export_run(copy, out=tmp_path / "out").path / "README.md").read_text()
    header, body = card.split("\n---\n", 1)
    assert set(yaml.safe_load(header.removeprefix("---\n"))) == {"library_name", "pipeline_tag", "tags"}
    assert as_text(text) in body
    clean = (export_run(runs("full"), out=tmp_path / "clean").path / "README.md").read_text().split("\n---\n", 1)[1]
    assert [line[:2] for line in body.splitlines()] == [line[:2] for line in clean.splitlines()]
    for mark in "<>[]`*_~{}$@\x1b\u202e":
        assert body.count(mark) == clean.count(mark), mark
    assert body.count("|") == clean.count("|")


def test_push_is_refused_before_anything_is_written(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run, out = runs("lora"), tmp_path / "out"
    with pytest.raises(PushRefusedError, match="got 'no name'; give a repository of the hub"):
        export_run(run, out=out, push="no name")
    with pytest.raises(PushRefusedError, match=r"base is a directory of this machine, .* push with --merged"):
        export_run(run, out=out, push="me/agent")
    with pytest.raises(PushRefusedError, match="HF_HUB_OFFLINE is set"):
        export_run(run, out=out, merged=True, push="me/agent")
    assert not out.exists()


def test_a_push_that_fails_leaves_the_export_and_tells_no_token(runs, tmp_path, monkeypatch):
    """Nothing listens at the address, which is this machine's."""
    token = "hf_" + "b" * 30
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushFailedError, match=r"the export lies whole at .*: `hf upload me/agent") as caught:
        export_run(runs("full"), out=tmp_path / "out", push="me/agent")
    assert token not in str(caught.value)
    assert not any(token.encode() in file.read_bytes() for file in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / "README.md").is_file()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(PushRefusedError, match="not logged in to the hub; `hf auth login`"):
        export_run(runs("full"), out=tmp_path / "other", push="me/agent")


def test_the_command(runs, tmp_path, monkeypatch):
    """Offline by the environment alone, as a user sets it; no token is told or written."""
    out = tmp_path / "out"
    shown = CliRunner().invoke(app, ["export", str(runs("lora")), "--out", str(out), "--merged", "--dtype", "bfloat16"])
    assert shown.exit_code == 0, shown.output
    assert f"wrote the merged weights of checkpoint 000003 to {out}" in shown.output.replace("\n", "")
    token = "hf_" + "a" * 30
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_TOKEN": token}
    arguments = ["export", str(runs("full")), "--out", str(tmp_path / "pushed"), "--push", "me/agent"]
    done = subprocess.run(
        [sys.executable, "-m", "keel", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("--push: HF_HUB_OFFLINE is set")
    assert token not in done.stderr + done.stdout
    assert not (tmp_path / "pushed").exists()
