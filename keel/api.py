"""The functions of `import keel`: what the command line does, from Python, with objects in place of names.

Each blocks until it is done, and may be called in a notebook's cell: Keel's own event loop runs in a thread of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keel.envs.base import Env
from keel.given import ConfigSource, configured, given_again
from keel.monitor.summary import RunSummary
from keel.rewards.base import Reward
from keel.runs import load_run

EnvLike = str | type[Env] | Callable[[], Env]
RewardLike = str | Reward
LossLike = str | Callable[..., Any]


def train(
    config: ConfigSource,
    *,
    env: EnvLike | None = None,
    reward: RewardLike | None = None,
    loss: LossLike | None = None,
) -> RunSummary:
    """Train as `config` says, in a new run directory; blocks until the run ends.

    `config` is a TrainConfig, the path of a TOML file, a recipe's name, or a mapping of the same shape as a file.
    `env`, `reward` and `loss` stand in for the config's: an Env class or a function without arguments that makes an
    environment; `(trajectory, task) -> float`; `(LossInputs, *, options) -> (loss per token [T], metrics)`; each may
    also be "package.module:name". The config.toml of the run has their names, RUN/sources their source.

    Raises ConfigError, PluginError and RunDirectoryError before anything is written, and what ends a run.
    """
    with configured(config, env=env, reward=reward, loss=loss) as checked:
        from keel import loop

        return loop.train(checked)


def resume(
    run: str | os.PathLike[str],
    *,
    env: EnvLike | None = None,
    reward: RewardLike | None = None,
    loss: LossLike | None = None,
) -> RunSummary:
    """Continue the run in the directory `run` from its newest whole checkpoint.

    Objects that `train` was given and that no name imports are given again. Raises RunDirectoryError for what is no
    run, ConfigError naming what has to be given, PluginError for an object that is not the run's.
    """
    path = Path(run)
    with given_again(load_run(path).config, env=env, reward=reward, loss=loss):
        from keel import loop

        return loop.resume(path)
