"""Which episodes a reader should see: the best, the worst, the strangest, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

import numpy as np

from keel.report.episodes import RecordedStep
from keel.types import Trajectory

OUTLIER_NATS = 1e-4
"""A log-prob gap above which rounding of float32 alone is no explanation."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An attempt of a recorded step, with what the choice goes by."""

    step: int
    index: int
    trajectory: Trajectory
    worst_gap: float  # largest |old - rollout| log-prob of a drawn token, nats; 0 if unknown
    surprise: float  # - sum of the engine's log-probs of drawn tokens, nats; 0 if unknown
    num_drawn: int

    @property
    def ref(self) -> str:
        return f"{self.step}/{self.index}"


def candidates(steps: Sequence[RecordedStep]) -> list[Candidate]:
    """All attempts of the steps that the world did not spoil."""
    return [_candidate(step, index) for step in steps for index in step.kept]


def choose(found: Sequence[Candidate], gap_limit: float = OUTLIER_NATS) -> dict[str, tuple[Candidate, str]]:
    """ "best", "worst" and "strangest", each with the reason in words; fewer if there are fewer attempts.

    Best is the highest reward, worst the lowest; among equals the latest step, for the best then the fewest tokens and
    for the worst the most. The strangest is the first of these that there is: the largest gap between engine and
    learner, if above `gap_limit`; an unreadable reply that was rewarded above the mean; the success that the policy
    itself found least likely; the most unusual length.
    """
    if not found:
        return {}
    best = max(found, key=lambda each: (each.trajectory.reward, each.step, -each.num_drawn))
    worst = min(found, key=lambda each: (each.trajectory.reward, -each.step, -each.num_drawn))
    chosen = {
        "best": (best, f"the highest reward, {best.trajectory.reward:.3g}, in the fewest tokens of the last such step")
    }
    if worst.trajectory.reward < best.trajectory.reward:
        text = f"the lowest reward, {worst.trajectory.reward:.3g}, in the last step that has it"
        if worst.trajectory.status == "truncated":
            text += "; it was cut by a limit"
        elif any(turn.malformed is not None for turn in worst.trajectory.turns):
            text += "; a reply of it could not be read"
        chosen["worst"] = (worst, text)
    others = [each for each in found if each.ref not in {picked.ref for picked, _ in chosen.values()}]
    for rule in (_largest_gap(gap_limit), _rewarded_though_unreadable, _least_likely_success, _odd_length):
        if "strangest" not in chosen and (pick := rule(others)) is not None:
            chosen["strangest"] = pick
    return chosen


Pick = tuple[Candidate, str] | None


def _largest_gap(limit: float) -> Callable[[Sequence[Candidate]], Pick]:
    def rule(found: Sequence[Candidate]) -> Pick:
        most = max(found, key=lambda each: each.worst_gap, default=None)
        if most is None or most.worst_gap <= limit:
            return None
        return most, f"engine and learner differ by {most.worst_gap:.2g} nats on one token, the most of all read"

    return rule


def _rewarded_though_unreadable(found: Sequence[Candidate]) -> Pick:
    mean = fmean(each.trajectory.reward for each in found) if found else 0.0
    odd = [
        each
        for each in found
        if each.trajectory.reward > mean and any(turn.malformed is not None for turn in each.trajectory.turns)
    ]
    if not odd:
        return None
    most = max(odd, key=lambda each: (each.trajectory.reward, each.step))
    return most, f"a reply that could not be read, and yet a reward of {most.trajectory.reward:.3g}"


def _least_likely_success(found: Sequence[Candidate]) -> Pick:
    """Of rewards above the mean: the attempt whose tokens the engine found least likely, all together."""
    mean = fmean(each.trajectory.reward for each in found) if found else 0.0
    good = [each for each in found if each.surprise > 0 and each.trajectory.reward > mean]
    if not good:
        return None
    most = max(good, key=lambda each: each.surprise)
    return (
        most,
        f"the least likely success: its {most.num_drawn} drawn tokens had log-prob {-most.surprise:.3g} together",
    )


def _odd_length(found: Sequence[Candidate]) -> Pick:
    if not found:
        return None
    lengths = [each.num_drawn for each in found]
    middle, spread = fmean(lengths), pstdev(lengths)
    most = max(found, key=lambda each: abs(each.num_drawn - middle))
    if not spread:
        return None
    return most, f"the oddest length: {most.num_drawn} drawn tokens, where {middle:.0f} are usual"


def _candidate(step: RecordedStep, index: int) -> Candidate:
    worst_gap, surprise, num_drawn = 0.0, 0.0, 0
    for view in step.sequences.get(index, ()):
        drawn = view.streams["policy_version"] >= 0
        num_drawn += int(drawn.sum())
        rollout = view.streams.get("rollout_logprobs")
        old = view.streams.get("old_logprobs", view.streams.get("logprobs"))
        if rollout is None or not drawn.any():
            continue
        surprise -= float(np.nan_to_num(rollout[drawn]).sum())
        if old is not None:
            gap = np.nan_to_num(np.abs(old[drawn] - rollout[drawn]), nan=np.inf)
            worst_gap = max(worst_gap, float(gap.max()))
    return Candidate(step.number, index, step.trajectories[index], worst_gap, surprise, num_drawn)
