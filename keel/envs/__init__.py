"""Worlds: where tasks come from, what the agent sees, what its replies earn. No torch.

The public names below are also the short names that `env.id` in a config may give.
"""

from __future__ import annotations

from keel.envs.arithmetic import CalculatorEnv
from keel.envs.reasoning_gym import ReasoningGymEnv

__all__ = ["CalculatorEnv", "ReasoningGymEnv"]
