"""Rewards that look at how much was drawn."""

from __future__ import annotations

from keel.types import Task, Trajectory


def soft_overlong(trajectory: Trajectory, task: Task, *, limit: int, margin: int, penalty: float = 1.0) -> float:  # noqa: ARG001
    """0 up to `limit - margin` drawn tokens, then falling in a line to `-penalty` at `limit` and beyond.

    Soft overlong punishment (DAPO: Yu et al. 2025, arXiv 2503.14476, equation 13): an attempt near the limit learns to
    be shorter instead of being cut off without a word. Add it to what the task pays. Raises ValueError unless
    0 < margin <= limit and penalty >= 0.
    """
    if not 0 < margin <= limit or penalty < 0:
        raise ValueError(
            f"soft_overlong: got limit={limit}, margin={margin}, penalty={penalty}; it needs 0 < margin <= limit and a "
            "penalty that is not negative"
        )
    over = trajectory.num_policy_tokens - (limit - margin)
    return -penalty * min(max(over, 0), margin) / margin
