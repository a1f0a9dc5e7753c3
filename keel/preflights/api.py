"""`keel.preflight(...)`: is this stack fit for on-policy training, and if not, why?"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keel.preflights.result import PreflightResult
from keel.types import SamplingSettings, UserFault

if TYPE_CHECKING:
    from keel.given import ConfigSource


def preflight(  # noqa: PLR0913 (keyword-only, one for each part of somebody's stack)
    config: ConfigSource | None = None,
    *,
    model: str | os.PathLike[str] = "",
    engine: Any = None,
    attention: str = "eager",
    dtype: str = "float32",
    sampling: SamplingSettings | None = None,
    revision: str = "",
    trust_remote_code: bool = False,
    allow_weight_push: bool = False,
    device: str = "auto",
    seed: int = 0,
    budget_s: float = 150.0,
    tell: Callable[[str], None] = lambda _: None,
) -> PreflightResult:
    """Check a run's stack, or anyone's, in about `budget_s` seconds of a quiet machine.

    Nothing is written but temporary files.

    Either `config` (a TrainConfig, the path of a TOML file, a recipe's name, or a mapping), or `model` (a Hugging Face
    directory or hub id) and `engine` (the address of a vLLM server, or an object of Keel's engine protocol): then the
    trainer is plain `transformers` with `attention` in `dtype`. `tell` is called with each question before it is asked.

    Raises ConfigError for a config that cannot be run, UserFault for arguments that do not go together or a model that
    cannot be had, EngineError for an engine that does not come up or is not there. What a stack does wrong is no error:
    it is in the result.
    """
    if (config is None) == (not model):
        raise UserFault("preflight: give a config, or model and engine; got " + ("both" if model else "neither"))
    if config is not None:
        return _of_run(config, seed=seed, budget_s=budget_s, tell=tell)
    if engine is None:
        raise UserFault("preflight: a model without an engine; give engine = the address of a vLLM server")
    from keel.preflights.opened import opened_stack
    from keel.preflights.runner import run_checks

    path = Path(model)
    if path.is_absolute() and not path.is_dir():
        raise UserFault(f"preflight: there is no model at {model}; give a Hugging Face directory or hub id")
    with opened_stack(
        str(model),
        engine=engine,
        attention=attention,
        dtype=dtype,
        sampling=sampling,
        revision=revision,
        trust_remote_code=trust_remote_code,
        allow_weight_push=allow_weight_push,
        device=device,
    ) as stack:
        return run_checks(stack, seed=seed, budget_s=budget_s, tell=tell)


def _of_run(config: ConfigSource, **options: Any) -> PreflightResult:
    from keel.given import configured

    needs: Mapping[str, Any] = {"needs": ("model.path|model.tiny.preset",)}
    with configured(config, **needs) as checked:
        from keel.preflights.opened import opened_run
        from keel.preflights.runner import run_checks

        limit = checked.rollout.max_sequence_tokens
        with opened_run(checked) as stack:
            return run_checks(stack, max_sequence_tokens=limit, **options)
