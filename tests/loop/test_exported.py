"""What a run leaves behind: its checkpoint is an ordinary model, in plain transformers and in `keel eval`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from keel import config_load
from keel.build import build_sampler
from keel.chat.base import Chat
from keel.chat.factory import make_chat
from keel.cli import app
from keel.config import ChatConfig, RolloutConfig, TrainConfig
from keel.envs.base import Env
from keel.envs.load import env_factory
from keel.evaluation import EvaluationError, evaluate, measure_tasks
from keel.types import Task, Trajectory

NUM_EPISODES = 24
Tokens = tuple[tuple[int, ...], ...]  # of each segment


def run_config(run: Path, weights: str) -> TrainConfig:
    """The run's own config, on the weights it ended with."""
    sets = (f"model.path={json.dumps(weights)}", 'model.tiny.preset=""')
    return config_load.load(run / "config.toml", sets)


async def plain_episode(model: torch.nn.Module, chat: Chat, env: Env, task: Task, limits: RolloutConfig) -> Tokens:
    """A greedy episode with nothing of Keel's between model and tokens: `transformers` generates every reply."""
    history = list(await env.reset(task))
    tools = env.tools()
    prompt = chat.start(history, tools)
    segments: list[tuple[int, ...]] = []
    for turn in range(limits.max_turns):
        room = limits.max_sequence_tokens - len(prompt.token_ids)
        if room <= 0:
            break
        input_ids = torch.tensor([prompt.token_ids])
        whole = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=min(limits.max_new_tokens, room),
            do_sample=False,
            eos_token_id=list(chat.stop_token_ids),
        )[0]
        drawn = whole[len(prompt.token_ids) :].tolist()
        seen = (*prompt.token_ids, *drawn)
        if prompt.extends and segments:
            segments[-1] = seen
        else:
            segments.append(seen)
        reply = chat.parse(drawn)
        step = await env.step(reply)
        if step.done or turn == limits.max_turns - 1 or drawn[-1] not in chat.stop_token_ids:
            break
        history.extend(reply.messages)
        prompt = chat.extend(seen, history, step.messages, tools)
        history.extend(step.messages)
    return tuple(segments)


def tokens_of(trajectory: Trajectory) -> Tokens:
    return tuple(segment.token_ids for segment in trajectory.segments)


@pytest.mark.parametrize("preset", ["gpt_oss", "qwen3", "qwen3_moe"])
def test_plain_transformers_plays_the_same_greedy_episodes(warm_run, warm_weights, preset):
    """Eager attention, default experts, `generate` with its own cache: the very same token ids."""
    weights = warm_weights(preset)
    config = run_config(warm_run(preset), weights)
    with build_sampler(config, None) as collector:
        tasks = collector.tasks("eval")[:NUM_EPISODES]
        episodes = collector.collect_eval(tasks, temperature=0.0, seed=0)
    model = AutoModelForCausalLM.from_pretrained(weights, attn_implementation="eager").eval()
    assert model.config._attn_implementation == "eager"
    chat, env = make_chat(ChatConfig(), AutoTokenizer.from_pretrained(weights)), env_factory(config.env)()

    async def play() -> list[Tokens]:
        return [await plain_episode(model, chat, env, task, config.rollout) for task in tasks]

    assert asyncio.run(play()) == [tokens_of(episode) for episode in episodes]
    # The comparison is worth something: these are episodes, with calls that were answered, and not all alike.
    assert sum(len(episode.turns) == 2 for episode in episodes) > NUM_EPISODES // 4
    assert sum(episode.status == "completed" for episode in episodes) > NUM_EPISODES // 2
    assert len({turn.reply_text for episode in episodes for turn in episode.turns}) > 2


def test_an_evaluation_of_the_weights_is_the_runs_last(warm_run, warm_weights):
    """Through a sampler without a learner, and from the command line: the same draws, so the same numbers."""
    run, weights = warm_run("gpt_oss"), warm_weights("gpt_oss")
    config = run_config(run, weights)
    evaluations = json.loads((run / "summary.json").read_text())["eval"]
    assert list(evaluations) == ["initial", "after_warm_start", "final"]
    result = evaluate(config)
    found = result.metrics
    assert found == {name: value for name, value in evaluations["final"].items() if name != "step"}
    assert found != {name: value for name, value in evaluations["after_warm_start"].items() if name != "step"}
    told = CliRunner().invoke(app, ["eval", str(run / "config.toml"), "--model", weights])
    assert told.exit_code == 0, told.output
    assert str(result) in told.output


def test_metrics_are_those_of_the_episodes(warm_run, warm_weights):
    """Temperature and seed are the config's; an episode that was cut off is no success."""
    config = run_config(warm_run("gpt_oss"), warm_weights("gpt_oss"))
    settings = config.eval.model_copy(update={"num_tasks": 20, "temperature": 0.7, "seed": 5})
    with build_sampler(config, None) as collector:
        found = measure_tasks(collector, settings).metrics
        episodes = collector.collect_eval(collector.tasks("eval")[:20], temperature=0.7, seed=5)
        updates = ({"seed": 6}, {"temperature": 0.0})
        others = [measure_tasks(collector, settings.model_copy(update=update)).metrics for update in updates]
    replies = [turn for episode in episodes for turn in episode.turns]
    successes = [episode.success is True for episode in episodes]
    assert (found["num_tasks"], found["failed"]) == (20, 0)
    assert found["success"] == sum(successes) / 20
    assert found["success_low"] <= found["success"] <= found["success_high"]
    assert found["reward"] == sum(episode.reward for episode in episodes) / 20
    assert found["turns"] == len(replies) / 20
    assert found["tokens"] == sum(episode.num_policy_tokens for episode in episodes) / 20
    unreadable = [turn for turn in replies if turn.malformed is not None and turn.finish_reason == "stop"]
    assert found["malformed"] == len(unreadable)  # one that was cut off is truncated, as in training
    assert all(other["tokens"] != found["tokens"] or other["reward"] != found["reward"] for other in others)


def test_a_fresh_tiny_model_can_be_evaluated(tmp_path, make_config):
    config = make_config(tmp_path / "none", "qwen3", eval={"num_tasks": 8})
    assert evaluate(config).num_tasks == 8
    assert not (tmp_path / "none").exists()


def test_evaluations_that_cannot_be_had(warm_run, warm_weights):
    config = run_config(warm_run("gpt_oss"), warm_weights("gpt_oss"))
    with build_sampler(config, None) as collector:
        with pytest.raises(EvaluationError, match="lower it"):
            measure_tasks(collector, config.eval.model_copy(update={"num_tasks": 10_000}))
        with pytest.raises(EvaluationError, match="nothing to evaluate"):
            measure_tasks(collector, config.eval.model_copy(update={"num_tasks": 0}))
