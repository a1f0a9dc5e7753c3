"""Keel: agentic reinforcement learning where the policy that learns is the policy that acted.

The names below are imported when first used, so `import keel` is quick and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keel import attention, report
    from keel.api import resume, train
    from keel.chat.base import Reply
    from keel.config import TrainConfig
    from keel.config_load import load as load_config
    from keel.envs.base import Demonstration, Env, EnvError, Step
    from keel.envs.task_env import task_env
    from keel.envs.tools import tool
    from keel.evaluation import evaluate
    from keel.evaluation_result import EvaluationResult
    from keel.gap.measure import mismatch
    from keel.gap.report import GapReport
    from keel.monitor.summary import RunSummary
    from keel.preflights.api import preflight
    from keel.preflights.result import PreflightResult
    from keel.runs import Run, StepRecord, load_record, load_run
    from keel.signal_check import rollout
    from keel.signal_result import RolloutResult
    from keel.types import Group, Message, Task, ToolSpec, Trajectory

__version__ = "0.1.0"

__all__ = [
    "Demonstration",
    "Env",
    "EnvError",
    "EvaluationResult",
    "GapReport",
    "Group",
    "Message",
    "PreflightResult",
    "Reply",
    "RolloutResult",
    "Run",
    "RunSummary",
    "Step",
    "StepRecord",
    "Task",
    "ToolSpec",
    "TrainConfig",
    "Trajectory",
    "__version__",
    "attention",
    "evaluate",
    "load_config",
    "load_record",
    "load_run",
    "mismatch",
    "preflight",
    "report",
    "resume",
    "rollout",
    "task_env",
    "tool",
    "train",
]

_HOMES = {
    "Demonstration": "keel.envs.base:Demonstration",
    "Env": "keel.envs.base:Env",
    "EnvError": "keel.envs.base:EnvError",
    "EvaluationResult": "keel.evaluation_result:EvaluationResult",
    "GapReport": "keel.gap.report:GapReport",
    "Group": "keel.types:Group",
    "Message": "keel.types:Message",
    "PreflightResult": "keel.preflights.result:PreflightResult",
    "Reply": "keel.chat.base:Reply",
    "RolloutResult": "keel.signal_result:RolloutResult",
    "Run": "keel.runs:Run",
    "RunSummary": "keel.monitor.summary:RunSummary",
    "Step": "keel.envs.base:Step",
    "StepRecord": "keel.runs:StepRecord",
    "Task": "keel.types:Task",
    "ToolSpec": "keel.types:ToolSpec",
    "TrainConfig": "keel.config:TrainConfig",
    "Trajectory": "keel.types:Trajectory",
    "attention": "keel.attention",
    "evaluate": "keel.evaluation:evaluate",
    "load_config": "keel.config_load:load",
    "load_record": "keel.runs:load_record",
    "load_run": "keel.runs:load_run",
    "mismatch": "keel.gap.measure:mismatch",
    "preflight": "keel.preflights.api:preflight",
    "report": "keel.report",
    "resume": "keel.api:resume",
    "rollout": "keel.signal_check:rollout",
    "task_env": "keel.envs.task_env:task_env",
    "tool": "keel.envs.tools:tool",
    "train": "keel.api:train",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'keel' has no attribute {name!r}")
    module, _, attribute = home.partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
