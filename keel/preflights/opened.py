"""From a run's config, or from the names of somebody's own parts, to a stack that can be checked."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from keel.build import make_engine, prepare, starting_model
from keel.chat.base import Chat
from keel.chat.factory import make_chat
from keel.chat.tokenizer import ChatFormatError, ChatTokenizer, as_chat_tokenizer, load_tokenizer
from keel.config import ChatConfig, EngineConfig, ModelConfig, RolloutConfig, TrainConfig
from keel.device import describe_device, resolve_device
from keel.engines.base import Engine
from keel.engines.embedded.engine import EmbeddedEngine
from keel.engines.embedded.load import load_policy
from keel.envs.base import Env
from keel.learner.distorted import distort_learner
from keel.models.policy import PolicyModel
from keel.ops.numerics import deterministic_algorithms
from keel.preflights.engine_side import AskedEngine
from keel.preflights.stack import ModelSource, Stack
from keel.preflights.trainer_keel import KeelTrainer
from keel.preflights.trainer_plain import PlainTrainer
from keel.types import SamplingSettings


@contextmanager
def opened_run(config: TrainConfig) -> Iterator[Stack]:
    """The stack that a run of `config` would have: its learner's policy and its engine; closed again in the end.

    A tiny model is built in a temporary directory. An engine in the learner's process samples from the learner's own
    modules, as it does in the run.
    """
    # Only a tiny model learns its words from the environment; a config without one can be checked too.
    factory = prepare(config, None if config.model.tiny.preset else _no_environment)
    with ExitStack() as closing:
        root = closing.enter_context(tempfile.TemporaryDirectory(prefix="keel-preflight-"))
        model = starting_model(config, factory, Path(root))
        device = resolve_device(config.device)
        closing.enter_context(deterministic_algorithms(config.numerics == "exact"))
        policy = load_learner_policy(model, device, config.numerics)
        engine = _engine_of(config, model, policy)
        if config.learner.distortions:
            closing.enter_context(distort_learner(policy, config.learner.distortions))
        tokenizer = as_chat_tokenizer(load_tokenizer(model.path, revision=model.revision))
        attached = bool(config.engine.id == "vllm" and config.engine.vllm.url)
        side = AskedEngine(engine, attached=attached, may_push=not attached or config.engine.vllm.allow_weight_push)
        closing.callback(side.close)
        sampling = SamplingSettings(config.rollout.temperature, config.rollout.top_p, config.rollout.top_k)
        yield Stack(
            source=source_of(model),
            trainer=KeelTrainer(policy, max_tokens=config.batch.max_tokens, dtype=model.dtype),
            engine=side,
            tokenizer=tokenizer,
            chat=make_chat(config.chat, tokenizer),
            sampling=sampling,
            config=config,
            description=_described(model, side, "keel", model.attention, sampling, device)
            | ({"model": f"tiny {config.model.tiny.preset}"} if config.model.tiny.preset else {}),
        )


@contextmanager
def opened_stack(
    model: str,
    *,
    engine: str | Engine,
    attention: str = "eager",
    dtype: str = "float32",
    sampling: SamplingSettings | None = None,
    revision: str = "",
    trust_remote_code: bool = False,
    allow_weight_push: bool = False,
    device: str = "auto",
    chat: ChatConfig | None = None,
) -> Iterator[Stack]:
    """Anyone's stack: a trainer in plain `transformers`, and a server at the address `engine` (or an engine object).

    Raises TrainerError or ChatFormatError for a model that cannot be had, EngineError for a server that cannot.
    """
    source = ModelSource(model, dtype, revision, trust_remote_code)
    trainer = PlainTrainer.load(source, attention=attention, device=resolve_device(device))
    asked = sampling or SamplingSettings()
    with ExitStack() as closing:
        if isinstance(engine, str):
            side = attach(model, engine, dtype=dtype, allow_weight_push=allow_weight_push, revision=revision)
        else:
            side = AskedEngine(engine, attached=True, may_push=allow_weight_push)
        closing.callback(side.close)
        tokenizer, found_chat, told = _tokenizer_of(model, revision, chat or ChatConfig())
        yield Stack(
            source=source,
            trainer=trainer,
            engine=side,
            tokenizer=tokenizer,
            chat=found_chat,
            sampling=asked,
            description={
                **_described(
                    ModelConfig(path=model, dtype="float32"), side, "transformers", attention, asked, trainer.device
                ),
                "dtype": dtype,
                **({"url": engine} if isinstance(engine, str) else {}),
                **({"chat": told} if told else {}),
            },
        )


def attach(model: str, url: str, *, dtype: str, allow_weight_push: bool, revision: str = "") -> AskedEngine:
    """The vLLM server at `url`, which serves `model`. Raises EngineError if there is none such."""
    from keel.preflights.attached import StrangersVllm, longest_sequence

    values: dict[str, Any] = {"id": "vllm", "vllm": {"url": url, "allow_weight_push": allow_weight_push}}
    config = ModelConfig.model_validate({"path": model, "dtype": dtype, "revision": revision})
    limit = min(RolloutConfig().max_sequence_tokens, longest_sequence(url))
    engine = StrangersVllm(config, EngineConfig.model_validate(values), max_sequence_tokens=limit)
    return AskedEngine(engine, attached=True, may_push=allow_weight_push)


def load_learner_policy(model: ModelConfig, device: torch.device | str, numerics: str) -> PolicyModel:
    """The policy as the learner loads it, without an optimizer."""
    policy = load_policy(model, device, numerics)
    if model.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    return policy


def _no_environment() -> Env:
    raise NotImplementedError("a preflight plays no episodes")


def source_of(model: ModelConfig) -> ModelSource:
    """Where a config's model lies."""
    return ModelSource(model.path, model.dtype, model.revision, model.trust_remote_code)


def _engine_of(config: TrainConfig, model: ModelConfig, policy: PolicyModel) -> Engine:
    shared = config.engine.id == "embedded" and config.engine.process == "same" and config.learner.ranks == 1
    if shared and not (config.engine.distortions or config.learner.distortions):
        return EmbeddedEngine(policy, config.engine, max_sequence_tokens=config.rollout.max_sequence_tokens)
    return make_engine(config, model, learner=None)


def _tokenizer_of(model: str, revision: str, config: ChatConfig) -> tuple[ChatTokenizer | None, Chat | None, str]:
    """Tokenizer and chat format of the model's directory; None for what is not there, and why."""
    try:
        tokenizer = as_chat_tokenizer(load_tokenizer(model, revision=revision))
    except (ChatFormatError, OSError, ValueError) as error:
        return None, None, f"no tokenizer: {error}"
    try:
        return tokenizer, make_chat(config, tokenizer), ""
    except ChatFormatError as error:
        return tokenizer, None, f"no chat format: {error}"


def _described(
    model: ModelConfig, side: AskedEngine, trainer: str, attention: str, sampling: SamplingSettings, device: Any
) -> dict[str, Any]:
    return {
        "model": model.path,
        "dtype": model.dtype,
        "engine": side.name,
        "trainer": trainer,
        "attention": attention,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "device": describe_device(torch.device(device)),
    }
