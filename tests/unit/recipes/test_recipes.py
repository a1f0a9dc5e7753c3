"""Recipes are planned from the models' published configurations alone: no weights, no network, no card."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from keel import config_load
from keel.cli import app
from keel.config_problems import ConfigError
from keel.config_recipes import recipe_names, recipe_summary
from keel.models import experts as keel_experts
from keel.models.lora import add_adapter
from keel.plan import make_plan
from keel.plan_memory import GIB, RESERVE

CONFIGS = Path(__file__).parent / "configs"
MODELS = {"qwen3_0.6b": "qwen3_0.6b", "qwen3_4b_lora": "qwen3_4b", "gpt_oss_20b_lora": "gpt_oss_20b"}
# Totals as published with the models; the two small ones count their tied embedding once.
PARAMETERS = {"qwen3_0.6b": 596_049_920, "qwen3_4b": 4_022_468_096, "gpt_oss_20b": 20_914_757_184}
HUB = {"qwen3_0.6b": "Qwen/Qwen3-0.6B", "qwen3_4b_lora": "Qwen/Qwen3-4B", "gpt_oss_20b_lora": "openai/gpt-oss-20b"}


def load(recipe: str, *sets: str):
    return config_load.load(recipe, [f"model.path={str(CONFIGS / MODELS[recipe])!r}", *sets])


def test_these_are_the_recipes():
    assert set(recipe_names()) == {*MODELS, "quickstart"}
    listed = CliRunner().invoke(app, ["recipes"]).output
    assert all(f"{name} " in listed and recipe_summary(name) in listed for name in recipe_names())


@pytest.mark.parametrize("recipe", MODELS)
def test_a_recipe_is_for_the_model_on_the_hub_with_the_published_number_of_parameters(recipe):
    assert config_load.load(recipe).model.path == HUB[recipe]
    plan = make_plan(load(recipe))
    assert plan.parameters == PARAMETERS[MODELS[recipe]]
    assert plan.stored_as == ("mxfp4" if recipe.startswith("gpt_oss") else "")


@pytest.mark.parametrize("recipe", MODELS)
def test_what_learns_is_counted_as_peft_makes_it(recipe):
    config = load(recipe)
    plan = make_plan(config)
    if config.model.lora.rank == 0:
        assert (plan.trained_parameters, plan.adapter) == (plan.parameters, "")
        return
    keel_experts.register()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(config.model.path), experts_implementation="keel"
        )
        add_adapter(model, config.model.lora, "base")
    made = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert plan.trained_parameters == made < plan.parameters / 40
    assert plan.memory.optimizer == 12 * made
    assert plan.memory.gradients == 4 * made
    assert plan.memory.weights == 2 * (plan.parameters + made)


@pytest.mark.parametrize("recipe", MODELS)
def test_a_recipe_fits_the_card_that_its_first_line_names(recipe):
    named = int(re.search(r"one card of (\d+) GiB", recipe_summary(recipe))[1])
    plan = make_plan(load(recipe))
    assert plan.peak_bytes <= (1 - RESERVE) * named * GIB
    smallest = int(re.fullmatch(r"fits a card of (\d+) GiB", plan.verdict)[1]) if plan.device_bytes is None else 0
    assert smallest <= named


@pytest.mark.parametrize("recipe", MODELS)
def test_the_command_plans_a_recipe_by_its_bare_name(recipe):
    path = str(CONFIGS / MODELS[recipe])
    done = CliRunner().invoke(app, ["train", recipe, "--dry-run", "--set", f"model.path={path!r}"])
    assert done.exit_code == 0, done.output
    lines = {line.split(maxsplit=1)[0]: line for line in done.output.splitlines()}
    assert f"{PARAMETERS[MODELS[recipe]]:,} parameters" in lines["model"]
    assert ("adapter" in lines) == recipe.endswith("lora")
    assert "key-values" in lines["memory"]
    assert "fit" in lines["verdict"]
    if recipe.startswith("gpt_oss"):
        assert "mxfp4: read exactly, held and exported unquantized" in lines["stored"]


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_load.load("qwen3_0.6b").steps == 200
    Path("qwen3_0.6b").write_text("steps = 7\n", encoding="utf-8")
    assert config_load.load("qwen3_0.6b").steps == 7


def test_a_name_that_is_no_recipe_is_told_where_to_find_them():
    with pytest.raises(ConfigError, match=r"keel recipes"):
        config_load.load("qwen3_06b")
    printed = CliRunner().invoke(app, ["recipes", "qwen3_0.6b"]).output
    assert printed == files("keel.recipes").joinpath("qwen3_0.6b.toml").read_text(encoding="utf-8")
    assert CliRunner().invoke(app, ["recipes", "qwen3_06b"]).exit_code == 2


def test_an_adapter_with_no_place_is_refused_by_the_plan():
    with pytest.raises(ConfigError, match=r"model\.lora\.targets.*has no experts"):
        make_plan(load("qwen3_4b_lora", 'model.lora.targets=["experts"]'))
