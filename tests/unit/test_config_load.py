"""What / got / fix with file and line; nothing is converted silently; a dump is a valid input."""

from __future__ import annotations

import textwrap
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.config import TrainConfig
from keel.config_lines import find_lines
from keel.config_load import dump, load, parse, require
from keel.config_problems import ConfigError
from keel.config_schema import field_at, tables


def problems(text="", sets=()):
    with pytest.raises(ConfigError) as caught:
        parse(textwrap.dedent(text), "run.toml", sets)
    return caught.value.problems


def only(text="", sets=()):
    (problem,) = problems(text, sets)
    return problem


def test_an_unknown_option_is_told_with_line_and_nearest_name():
    problem = only(
        """\
        seed = 1

        [rollout]
        group_sise = 16
        """
    )
    assert problem.where == "run.toml:4"
    assert "'group_sise' in [rollout]" in problem.what
    assert problem.got == "16 (a whole number)"
    assert problem.fix == "did you mean 'group_size'?"


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("group_size = 3", "'group_size' belongs to [rollout]"),
        ("[rollout]\nlr = 0.1", "'lr' belongs to [optim] or [warm_start.optim]"),
        ("[rollout]\nsteps = 1", "'steps' belongs to the top of the file or [warm_start]"),
        ("[rolout]\nx = 1", "did you mean 'rollout'?"),
        ("[kl]\nx = 1", "'kl' belongs to [algo]"),
        ("[model]\nqqqq = 1", "known here: path, "),
    ],
)
def test_a_misplaced_or_misspelt_name_is_sent_where_it_belongs(text, fix):
    assert fix in only(text).fix


@pytest.mark.parametrize(
    ("text", "got", "fix"),
    [
        ('seed = "3"', '"3" (a string)', "seed takes a whole number >= 0"),
        ("seed = 3.0", "3.0 (a number)", "a whole number"),
        ("steps = true", "true (a boolean)", "a whole number"),
        ("[model]\ngradient_checkpointing = 1", "1 (a whole number)", "true or false"),
        ('[model]\ndtype = "float23"', '"float23" (a string)', "did you mean 'float32'?"),
        ("[optim]\nlr = 0.0", "0.0 (a number)", "a number > 0"),
        ("[optim]\nlr = inf", "inf", "a number > 0"),
        ("[optim]\nlr = nan", "nan", "a number > 0"),
        ("[rollout]\ntop_p = 1.5", "1.5 (a number)", "> 0 and <= 1"),
        ('[log]\ntrackers = ["mlflow"]', '"mlflow" (a string)', 'a list, each one of "tensorboard"'),
        ("name = 1979-05-27", "1979-05-27", "put it in quotes"),
        ("[env.options]\nday = [1979-05-27]", "1979-05-27", "put it in quotes"),
    ],
)
def test_wrong_values_are_refused_not_converted(text, got, fix):
    problem = only(text)
    assert got in problem.got
    assert fix in problem.fix


def test_a_whole_number_is_a_number():
    assert parse("[rollout]\ntemperature = 1").rollout.temperature == 1.0


def test_all_faults_are_told_at_once():
    found = problems('seed = "x"\nstepz = 1\n[optim]\nlr = -1\n')
    assert sorted(problem.where for problem in found) == ["run.toml:1", "run.toml:2", "run.toml:4"]


def test_a_broken_file_is_told_with_its_line():
    problem = only("seed = 1\nname = first\n")
    assert problem.where == "run.toml:2"
    assert problem.got == "name = first"
    assert "quotes" in problem.fix


def test_an_impossible_combination_names_the_lines_of_both():
    problem = only("[rollout]\nmax_new_tokens = 64\n\nmax_sequence_tokens = 64\n")
    assert problem.where == "run.toml:2 and run.toml:4"
    assert "rollout.max_new_tokens = 64, rollout.max_sequence_tokens = 64" in problem.got


def test_set_wins_over_the_file_and_is_named_in_faults():
    text = "[rollout]\ngroup_size = 4\n"
    assert parse(text, sets=["rollout.group_size=8"]).rollout.group_size == 8
    assert only(text, ["rollout.group_size=eight"]).where == "--set rollout.group_size=eight"


@pytest.mark.parametrize(
    ("argument", "path", "value"),
    [
        ("name=first run", "name", "first run"),
        ('name="quoted"', "name", "quoted"),
        ("optim.lr=3e-4", "optim.lr", 3e-4),
        ("model.path=org/model-1.5", "model.path", "org/model-1.5"),
        ("warm_start.optim.lr=0.5", "warm_start.optim.lr", 0.5),
        ("env.options={ a = 1, b = [2] }", "env.options", {"a": 1, "b": [2]}),
        ("model.path=a=b", "model.path", "a=b"),
    ],
)
def test_set_takes_toml_and_bare_words(argument, path, value):
    found = parse("", sets=[argument])
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        ("seed", "not an assignment"),
        ("=3", "not an assignment"),
        ("optim..lr=3", "not an assignment"),
        ("seed=[1,", "not TOML"),
        ("seed.x=1", None),
    ],
)
def test_a_broken_set_is_refused(argument, what):
    problem = only(sets=[argument])
    assert problem.where == f"--set {argument}"
    assert what is None or what in problem.what


def test_set_reaches_into_a_plugin_given_by_name():
    config = parse('[algo]\nloss = "ppo_clip"\n', sets=["algo.loss.clip_high=0.28"])
    assert config.algo.loss.model_dump() == {"id": "ppo_clip", "clip_high": 0.28}


def test_options_without_an_id_belong_to_the_default_plugin():
    assert parse("[algo.loss]\nclip_low = 0.1\n").algo.loss.model_dump() == {"id": "ppo_clip", "clip_low": 0.1}


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ('[algo]\nloss = "ppo_clap"', "run.toml:2", "did you mean 'ppo_clip'?"),
        ('[algo]\nadvantage = "group_men"', "run.toml:2", "did you mean 'group_mean'?"),
        ("[algo.loss]\nclip_hi = 0.1", "run.toml:2", "did you mean 'clip_high'?"),
        ('[algo.loss]\nclip_low = 0.1\nclip_high = "a"', "run.toml:3", "clip_high takes a number"),
        ('[algo]\ncorrection = { id = "token_truncated", cup = 1.0 }', "run.toml:2", "did you mean 'cap'?"),
        ('[algo]\nloss = "no.such.module:f"', "run.toml:2", "cannot import"),
        ('[algo]\nloss = "math:pi"', "run.toml:2", "function or a class"),
        ('[env]\nid = "CalculatorEnv"\n[env.options]\nnum_task = 3', "run.toml:4", "did you mean 'num_tasks'?"),
        ('[env]\nid = "keel.envs.base:Env"\n[warm_start]\nsteps = 5', "run.toml:4", "demonstrations"),
        ('[engine]\nid = "vlm"', "run.toml:2", "did you mean 'vllm'?"),
        ('[engine]\nid = "sglang"', "run.toml:2", "known: embedded, vllm"),
        ('[engine]\nid = "keel.engines.base:Engin"', "run.toml:2", "did you mean 'Engine'?"),
    ],
)
def test_plugins_are_checked_against_the_real_functions(text, where, message):
    problem = only(text)
    assert problem.where == where
    assert message in problem.fix


def test_a_warm_start_is_possible_where_there_are_demonstrations():
    parse('[env]\nid = "CalculatorEnv"\n[warm_start]\nsteps = 5')
    parse("[warm_start]\nsteps = 5")  # an environment given as an object is asked later


def test_what_a_command_needs_is_demanded():
    with pytest.raises(ConfigError, match=r"env\.id is needed") as caught:
        require(TrainConfig(), ("model.path|model.tiny.preset", "env.id", "name"), "run.toml")
    assert [problem.what for problem in caught.value.problems] == [
        "model.path or model.tiny.preset is needed and not given",
        "env.id is needed and not given",
    ]
    with_tiny = TrainConfig.model_validate({"model": {"tiny": {"preset": "qwen3"}}, "env": {"id": "CalculatorEnv"}})
    require(with_tiny, ("model.path|model.tiny.preset", "env.id"), "run.toml")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.toml")


def test_the_dump_of_the_defaults_is_a_documented_input():
    text = dump(TrainConfig())
    assert parse(text) == TrainConfig()
    for table in tables():
        for option in table.options:
            assert f"  # {option.help}" in text


awkward = st.text(max_size=20).filter(
    lambda text: "\x00" not in text and not any(0xD800 <= ord(c) < 0xE000 for c in text)
)
json_like = st.recursive(
    st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | awkward,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(awkward.filter(bool), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    name=awkward,
    lr=st.floats(1e-300, 1e300),
    options=st.dictionaries(awkward.filter(bool), json_like, max_size=3),
    clip=st.floats(0, 1),
    trackers=st.lists(st.sampled_from(["tensorboard", "wandb"]), max_size=2),
)
def test_any_config_survives_being_written_and_read(name, lr, options, clip, trackers):
    config = TrainConfig.model_validate(
        {
            "name": name,
            "optim": {"lr": lr},
            "env": {"options": options},
            "algo": {"loss": {"id": "ppo_clip", "clip_low": clip}},
            "log": {"trackers": tuple(trackers)},
        }
    )
    assert parse(dump(config)) == config


def test_lines_of_every_shape_of_statement():
    text = textwrap.dedent(
        '''\
        a = 1            # 1
        b.c = """
        [not.a.header]
        d = 5
        """
        [t]
        x = [
          1,  # [u]
        ]
        y = { z = 3 }
        [t."odd.name"]
        w = "#"
        '''
    )
    assert tomllib.loads(text)["t"]["odd.name"]["w"] == "#"
    assert find_lines(text) == {
        ("a",): 1,
        ("b",): 2,
        ("b", "c"): 2,
        ("t",): 6,
        ("t", "x"): 7,
        ("t", "y"): 10,
        ("t", "y", "z"): 10,
        ("t", "odd.name"): 11,
        ("t", "odd.name", "w"): 12,
    }


def test_every_line_of_the_dump_is_found_where_it_stands():
    text = dump(TrainConfig())
    lines = text.splitlines()
    found = find_lines(text)
    for table in tables():
        for option in table.options:
            assert lines[found[option.path] - 1].startswith(f"{option.path[-1]} ="), option.name
            assert field_at(option.path) is not None


def test_a_reward_is_a_plugin_of_the_environment() -> None:
    config = parse('[env]\nid = "CalculatorEnv"\nreward = { id = "exact_match", ignore_case = true }\n')
    assert config.env.reward.options == {"ignore_case": True}
    with pytest.raises(ConfigError, match="answer_key"):
        parse('[env]\nid = "CalculatorEnv"\nreward = { id = "exact_match", anser_key = "x" }\n')


def test_a_tiny_model_needs_no_demonstrations_but_those_it_names_must_be_there() -> None:
    text = '[model.tiny]\npreset = "gpt_oss"\n[env]\nid = "ReasoningGymEnv"\noptions = { datasets = {} }\n'
    parse(text)
    with pytest.raises(ConfigError, match="missing_module"):
        parse(text + '[warm_start]\ndemonstrations = "missing_module:some"\n')
