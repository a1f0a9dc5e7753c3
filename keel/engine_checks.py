"""Can this engine sample for this run? Asked once, before the first token, of what the engine says it can do."""

from __future__ import annotations

from keel.config import ModelConfig, TrainConfig
from keel.config_problems import ConfigError, Problem
from keel.engines.base import EngineCapabilities
from keel.engines.identity import ModelIdentity, identity_of, refuse_differences
from keel.types import SamplingSettings


def identity_of_model(model: ModelConfig) -> ModelIdentity:
    """The identity of what the learner starts from."""
    return identity_of(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)


def check_engine(config: TrainConfig, can: EngineCapabilities, identity: ModelIdentity) -> None:
    """Raises ConfigError if the engine cannot tell what the learner must know of its draws, IdentityError if it runs
    another model than the learner, whose `identity` is given.

    An engine with faults planted on purpose may run another model: that is a fault to find.
    """
    problems = [] if config.steps == 0 else [*_support(config, can), *_routes(config, can)]
    if problems:
        raise ConfigError(problems)
    if can.identity is not None and not config.engine.distortions:
        refuse_differences(
            identity,
            can.identity,
            who=("the learner", f"engine {can.name!r}"),
            fix="serve the directory that model.path names; of a hub id, set model.revision to a commit",
        )


def check_resumed(saved: ModelIdentity, now: ModelIdentity) -> None:
    """Raises IdentityError if the model's files are not those that the checkpoint was made with."""
    refuse_differences(
        saved,
        now,
        who=("the checkpoint", "model.path now"),
        fix="put the files back as they were (of a hub id, set model.revision to that commit), or start a new run",
    )


def _support(config: TrainConfig, can: EngineCapabilities) -> list[Problem]:
    rollout = config.rollout
    sampling = SamplingSettings(rollout.temperature, rollout.top_p, rollout.top_k)
    if not sampling.is_cut or can.returns_support or config.learner.missing_support == "own_cut":
        return []
    return [
        Problem(
            "rollout.top_p, rollout.top_k",
            f"engine {can.name!r} does not say what the cut left to choose from, so the learner's log-probs would be "
            "those of another distribution",
            f"rollout.top_p = {rollout.top_p}, rollout.top_k = {rollout.top_k}",
            'set rollout.top_p = 1.0 and rollout.top_k = 0, or learner.missing_support = "own_cut": the learner makes '
            "the cut again, with the drawn token always inside",
        )
    ]


def _routes(config: TrainConfig, can: EngineCapabilities) -> list[Problem]:
    if config.learner.replay_routes != "on" or can.returns_routes or config.algo.updates_per_batch > 1:
        return []
    return [
        Problem(
            "learner.replay_routes",
            f"engine {can.name!r} returns no expert choices that could be replayed",
            'learner.replay_routes = "on"',
            'set engine.return_routes = true if the model has experts, or replay_routes = "auto"',
        )
    ]
