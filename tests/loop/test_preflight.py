"""Preflight on small stacks: nothing is raised on healthy ones, and what is planted is found and named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import keel
from keel.cli.program import app
from keel.config import TrainConfig
from keel.distortion import Distortion
from keel.engines.base import EngineError, GenerateRequest, GenerateResult
from keel.engines.distorted import distort_engine
from keel.engines.embedded.engine import EmbeddedEngine
from keel.models.policy import PolicyModel
from keel.models.tiny import build_tiny_model, build_tiny_tokenizer
from keel.preflights.opened import opened_run, opened_stack
from keel.preflights.probes import TOPICS
from keel.preflights.result import PreflightResult
from keel.preflights.runner import QUESTIONS, run_checks
from keel.types import UserFault

SHAPES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 48, "head_dim": 16},
    "qwen3": {"num_hidden_layers": 2},
    "qwen3_moe": {"num_hidden_layers": 3},
}
LIMIT = 300


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small model with a tokenizer of its own, by preset."""
    made: dict[str, Path] = {}

    def build(preset: str) -> Path:
        if preset not in made:
            made[preset] = tmp_path_factory.mktemp(preset)
            style = "harmony" if preset == "gpt_oss" else "chatml"
            texts = [*TOPICS, "system developer user assistant final commentary analysis lookup word"] * 4
            tokenizer = build_tiny_tokenizer(texts, 330, style=style)
            build_tiny_model(preset, made[preset], tokenizer=tokenizer, seed=2, **SHAPES[preset])
        return made[preset]

    return build


def config_of(path: Path, dtype: str = "float32", **sections: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "num_threads": 1,
        "model": {"path": str(path), "dtype": dtype},
        "chat": {"system_message": "none"},
        "engine": {"slots": 8},
        "rollout": {"max_sequence_tokens": LIMIT, "max_new_tokens": 32},
    }
    merged: dict[str, Any] = dict(values)
    for name, section in sections.items():
        merged[name] = {**values.get(name, {}), **section}
    return TrainConfig.model_validate(merged)


def checked(config: TrainConfig, **options: Any) -> PreflightResult:
    with opened_run(config) as stack:
        return run_checks(stack, seed=3, share=0.15, max_sequence_tokens=LIMIT, **options)


def raised(result: PreflightResult) -> dict[str, str]:
    return {check.id: check.reason for check in result.checks if check.status in ("warn", "fail")}


@pytest.mark.parametrize(
    ("preset", "dtype"),
    [("gpt_oss", "float32"), ("gpt_oss", "bfloat16"), ("qwen3", "bfloat16"), ("qwen3_moe", "float32")],
)
def test_nothing_is_raised_on_a_healthy_stack(preset, dtype, model_directory):
    result = checked(config_of(model_directory(preset), dtype))
    assert raised(result) == {}
    assert result.causes == ()
    assert {check.id for check in result.checks} == {question.id for question in QUESTIONS}
    skipped = {check.id for check in result.checks if check.status == "skip"}
    assert skipped <= {"sinks", "experts", "routing", "identity"}
    assert ("sinks" in skipped) == (preset != "gpt_oss")
    assert result.gap["tokens"] > 100
    assert PreflightResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_the_model_directory_is_left_as_it_was(model_directory):
    path = model_directory("gpt_oss")
    before = {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in path.iterdir()}
    with opened_run(config_of(path)) as stack:
        weights = {name: p.detach().clone() for name, p in stack.trainer.model.named_parameters()}
        run_checks(stack, share=0.1, max_sequence_tokens=LIMIT)
        for name, parameter in stack.trainer.model.named_parameters():
            assert torch.equal(parameter, weights[name]), name
            assert parameter.grad is None, name
    assert {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in path.iterdir()} == before


PLANTED = [
    ("engine", "sinks_dropped", 1.0, ""),
    ("engine", "wrong_temperature", 0.3, ""),
    ("engine", "stale_tensor_group", 1.0, "attention.sinks"),
    ("engine", "stale_version", 1, ""),
    ("learner", "window_off", 1.0, ""),
    ("learner", "shifted_logprobs", 1, ""),
]


@pytest.mark.parametrize(("side", "cause", "strength", "group"), PLANTED)
def test_a_planted_fault_fails_and_is_named_with_its_side(side, cause, strength, group, model_directory):
    planted = [{"cause": cause, "strength": strength, "group": group}]
    result = checked(config_of(model_directory("gpt_oss"), **{side: {"distortions": planted}}))
    assert result.verdict == "fail"
    assert cause in result.causes[:3]
    named = next(each for each in result.attribution if each.cause == cause)
    assert named.side == side
    assert named.group == group
    old_weights = {each for each in result.causes if each.startswith("stale_")}
    assert old_weights <= {cause}  # what is pushed arrives, however wrong the log-probs are


class Ending:
    """An engine that gives way: after `good` answers `how` happens."""

    def __init__(self, engine: EmbeddedEngine, good: int, how: Callable[[GenerateResult], GenerateResult]) -> None:
        self.engine, self.good, self.how = engine, good, how

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        result = await self.engine.generate(request)
        self.good -= 1
        return result if self.good >= 0 else self.how(result)


def dies(_: GenerateResult) -> GenerateResult:
    raise EngineError("the engine is gone: connection refused")


def raises(_: GenerateResult) -> GenerateResult:
    raise KeyError("choices")


def talks_nonsense(result: GenerateResult) -> GenerateResult:
    spans = tuple(dataclasses.replace(span, token_ids=(10**6,) * len(span.token_ids)) for span in result.spans)
    return dataclasses.replace(result, spans=spans)


def says_nothing(result: GenerateResult) -> GenerateResult:
    return dataclasses.replace(result, spans=())


@contextmanager
def ending_stack(path: Path, good: int, how: Callable[[GenerateResult], GenerateResult]) -> Iterator[Any]:
    policy = PolicyModel.load(path)
    section = config_of(path).engine
    engine = EmbeddedEngine(policy, section, max_sequence_tokens=LIMIT, shares_weights=False)
    with opened_stack(str(path), engine=Ending(engine, good, how), device="cpu") as stack:
        yield stack


@pytest.mark.parametrize(
    ("good", "how", "told"),
    [
        (5, dies, "connection refused"),
        (0, raises, "KeyError"),
        (0, talks_nonsense, "1000000"),
        (0, says_nothing, "no token"),
    ],
)
def test_an_engine_that_gives_way_fails_a_check_and_what_was_gained_is_kept(good, how, told, model_directory):
    with ending_stack(model_directory("qwen3"), good, how) as stack:
        result = run_checks(stack, share=0.1, max_sequence_tokens=LIMIT)
    assert result.verdict == "fail"
    found = {check.id: check for check in result.checks}
    assert told in found["gap"].reason
    assert found["attention"].status == "pass"
    assert result.gap == {}


def test_nothing_is_pushed_to_an_engine_that_was_attached_to(model_directory):
    with ending_stack(model_directory("qwen3"), 10**9, dies) as stack:
        before = stack.engine.health().policy_version
        result = run_checks(stack, share=0.1, max_sequence_tokens=LIMIT)
        assert stack.engine.health().policy_version == before
    weights = next(check for check in result.checks if check.id == "weights")
    assert weights.status == "skip"
    assert "--allow-weight-push" in weights.reason
    assert raised(result) == {}  # a trainer in plain transformers agrees with Keel's engine


def test_a_distorted_engine_of_somebody_else_is_told_from_its_trainer(model_directory):
    path = model_directory("gpt_oss")

    def make(directory: Path) -> EmbeddedEngine:
        section = config_of(path).engine
        return EmbeddedEngine(PolicyModel.load(directory), section, max_sequence_tokens=LIMIT, shares_weights=False)

    engine = distort_engine(make, path, [Distortion("window_off", 1.0)])
    with opened_stack(str(path), engine=engine, device="cpu") as stack:
        result = run_checks(stack, share=0.15, max_sequence_tokens=LIMIT)
    assert result.causes[:1] == ("window_off",)
    assert result.attribution[0].side == "engine"
    found = {check.id: check.status for check in result.checks}
    assert (found["gap"], found["reference"], found["windows"]) == ("fail", "fail", "pass")


def test_the_command_tells_usage_from_failure(model_directory, tmp_path):
    run = CliRunner()
    path = tmp_path / "run.toml"
    lines = [
        "num_threads = 1",
        f"model = {{ path = {json.dumps(str(model_directory('qwen3')))} }}",
        'chat = { system_message = "none" }',
        "engine = { slots = 8 }",
        "rollout = { max_sequence_tokens = 200, max_new_tokens = 16 }",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "out.json"
    done = run.invoke(app, ["preflight", str(path), "--json", str(out), "--page", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert "Fit for on-policy training" in done.output
    assert json.loads(out.read_text())["verdict"] == "pass"
    assert (tmp_path / "page.html").stat().st_size > 10_000
    fault = "engine.distortions=[{cause='wrong_temperature', strength=0.4}]"
    done = run.invoke(app, ["preflight", str(path), "--set", fault])
    assert done.exit_code == 3, done.output
    assert "another temperature" in done.output
    for arguments in ([], ["--model", "x"], ["--model", "x", "--engine", "not an address"], [str(path), "--attn", "a"]):
        assert run.invoke(app, ["preflight", *arguments]).exit_code == 2


def test_arguments_that_do_not_go_together_are_refused(tmp_path):
    with pytest.raises(UserFault, match="give a config, or model and engine"):
        keel.preflight()
    with pytest.raises(UserFault, match="without an engine"):
        keel.preflight(model="x")
    with pytest.raises(UserFault, match="there is no model"):
        keel.preflight(model=tmp_path / "none", engine="http://127.0.0.1:9")
    with pytest.raises(UserFault, match="cannot be loaded"):
        keel.preflight(model=tmp_path, engine="http://127.0.0.1:9")
