"""What `keel rollout` found out, as plain values: to print, to write as JSON, to show in a notebook. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from keel.monitor.live import duration, number
from keel.monitor.printable import one_line
from keel.monitor.signal import Judgement, Outcomes, judge, percent
from keel.monitor.wilson import wilson_interval
from keel.rollouts.metrics import has_signal
from keel.types import Group, Origin, Trajectory

SCHEMA_VERSION = 1
MIB = 2**20
REASONS = 3
REASON_LIMIT = 300


@dataclass(frozen=True, slots=True)
class EpisodePart:
    """Consecutive tokens of one origin as text; `turn` is the reply that they are, or lead to, counted from 0."""

    turn: int
    origin: Origin
    num_tokens: int
    text: str


@dataclass(frozen=True, slots=True)
class Projection:
    """Seconds that a whole training step would take, from what was measured; None where nothing was.

    `learn_s` has an independent pass of the recompute check in it, but neither the optimizer's step nor publishing.
    """

    rollout_s: float
    learn_s: float | None
    overlapping: bool  # rollouts go on in the background while the learner learns
    steps: int

    @property
    def step_s(self) -> float | None:
        if self.learn_s is None:
            return None
        return max(self.rollout_s, self.learn_s) if self.overlapping else self.rollout_s + self.learn_s


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes. `planned` as `keel train --dry-run` counts; `before` is what the process held before the model was loaded,
    `peak` the most it ever held, `machine` what there is; the card's are None without one."""

    planned: int
    before: int
    peak: int
    machine: int
    card_peak: int | None = None
    card: int | None = None


@dataclass(frozen=True)
class RolloutResult:
    """Some episodes of a config's policy in its environment, and what they say about training on them.

    `metrics` has the names of docs/loop.md; `policy/*` and `mismatch/*` are of a pass of the learner that changed no
    weights, and absent if there was none. `episode` is one of the trajectories, as tokens were read and drawn.
    """

    groups: tuple[Group, ...] = field(repr=False)  # megabytes of tokens
    metrics: Mapping[str, float]
    projection: Projection
    memory: MemoryUse
    shown: Trajectory = field(repr=False)
    episode: tuple[EpisodePart, ...] = field(repr=False)
    device: str = "cpu"
    notes: tuple[str, ...] = ()

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        return tuple(trajectory for group in self.groups for trajectory in group.trajectories)

    @property
    def outcomes(self) -> Outcomes:
        """Counts over all episodes; a group has a signal if its rewards differ."""
        return Outcomes.of({name: self.metrics[name] for name in self.metrics if not name.startswith("advantage/")})

    @property
    def judgement(self) -> Judgement:
        return judge(self.outcomes)

    @property
    def success(self) -> tuple[float, float, float] | None:
        """Share of kept attempts that succeeded with its 95 % interval; None if the environment says nothing of it.

        Attempts at one task are alike, so the true interval is wider where group_size is large and tasks are few.
        """
        seen = self.outcomes
        if not seen.judged:
            return None
        return seen.success / seen.judged, *wilson_interval(round(seen.success), seen.judged)

    def reasons(self, kind: str) -> list[tuple[str, int]]:
        """The most frequent reasons of "failed", "malformed" or "truncated", with how often each came up."""
        found = Counter(_REASONS[kind](self.trajectories))
        return found.most_common(REASONS)

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values, without the texts of episodes."""
        judgement, success = self.judgement, self.success
        return {
            "schema_version": SCHEMA_VERSION,
            "device": self.device,
            "groups": len(self.groups),
            "episodes": len(self.trajectories),
            "success": None if success is None else dict(zip(("share", "low", "high"), success, strict=True)),
            "signal_share": self.outcomes.signal_share,
            "reasons": {kind: [list(item) for item in self.reasons(kind)] for kind in _REASONS},
            "metrics": dict(self.metrics),
            "projection": {**asdict(self.projection), "step_s": self.projection.step_s},
            "memory": asdict(self.memory),
            "verdict": asdict(judgement),
            "notes": list(self.notes),
        }

    def rows(self) -> list[tuple[str, str]]:
        """The figures as pairs of label and text, as printed and as shown in a notebook."""
        seen = self.outcomes
        rows = [("episodes", f"{seen.episodes} ({_counted(seen.groups, 'task', 'tasks')})")]
        if self.success is not None:
            share, low, high = self.success
            rows.append(("success", f"{percent(share)} (95 % interval {percent(low)} to {percent(high)})"))
        rows += [
            ("reward", f"{number(seen.mean_reward)} in the mean" if seen.kept else "none: every episode failed"),
            ("groups whose rewards differ", f"{seen.with_signal} of {seen.groups} ({percent(seen.signal_share)})"),
            ("malformed replies", self._told(seen.malformed_share, "malformed")),
            ("truncated episodes", self._told(seen.truncated_share, "truncated")),
            ("failed episodes", self._told(seen.failed_share, "failed")),
        ]
        return [*rows, *self._episode_rows(), *self._learner_rows(), *self._projected_rows()]

    def _episode_rows(self) -> list[tuple[str, str]]:
        """What an episode takes; those that failed are in the time of all together only."""
        seen, metrics = self.outcomes, self.metrics
        took, per_s = metrics["time/rollout_s"], round(metrics["rollout/tokens_per_s"])
        together = f"{seconds(took)}: {seconds(took / max(1, seen.episodes))} per episode, "
        rows = [("all together", f"{together}{per_s:,} tokens drawn per second")]
        if not seen.kept:
            return rows
        engine, world = seconds(metrics["rollout/generate_s"]), seconds(metrics["rollout/env_s"])
        tokens = f"{metrics['rollout/episode_tokens']:.0f} tokens, {self._drawn():.0f} of them drawn"
        return [
            ("an episode", f"{_counted(metrics['rollout/turns'], 'reply', 'replies')}, {tokens}"),
            ("it waits", f"{engine} for the engine, {world} for the environment"),
            *rows,
        ]

    def _drawn(self) -> float:
        """Tokens drawn per episode that was not spoilt."""
        kept = [trajectory for trajectory in self.trajectories if not trajectory.failed]
        return sum(trajectory.num_policy_tokens for trajectory in kept) / max(1, len(kept))

    def _told(self, share: float, kind: str) -> str:
        found = self.reasons(kind)
        reasons = "; ".join(f"{one_line(reason, limit=REASON_LIMIT)} ({count}x)" for reason, count in found)
        return percent(share) + (f": {reasons}" if reasons else "")

    def _learner_rows(self) -> list[tuple[str, str]]:
        if "policy/loss" not in self.metrics:
            return []
        names = ("mismatch/abs_mean", "mismatch/abs_max", "policy/recompute_max_dev")
        mean, worst, again = (self.metrics.get(name) for name in names)
        rows = []
        if mean is not None:
            rows.append(("engine against learner", f"log-probs differ by {number(mean)}, at most {number(worst)} nats"))
        if again is not None:
            rows.append(("learner twice", "equal to the bit" if again == 0 else f"ratio off 1 by up to {again:.3g}"))
        return rows

    def _projected_rows(self) -> list[tuple[str, str]]:
        projection, memory = self.projection, self.memory
        parts = [f"rollouts {seconds(projection.rollout_s)}"]
        parts += [] if projection.learn_s is None else [f"learner {seconds(projection.learn_s)}"]
        joined = " beside " if projection.overlapping else " + "
        step_s = projection.step_s
        rows = [("a training step", ("" if step_s is None else f"about {seconds(step_s)}: ") + joined.join(parts))]
        if step_s is not None:
            rows.append((f"{projection.steps} steps", f"about {duration(step_s * projection.steps)}"))
        held = f"held {mebibytes(memory.peak)}, {mebibytes(memory.before)} of it before the model"
        rows.append(("memory", f"planned {mebibytes(memory.planned)}; {held}; there is {mebibytes(memory.machine)}"))
        if memory.card_peak is not None and memory.card is not None:
            rows.append(("memory of the card", f"held {mebibytes(memory.card_peak)} of {mebibytes(memory.card)}"))
        return rows

    def __str__(self) -> str:
        """The figures and the verdict, as `keel rollout` prints them, without the episode."""
        rows = [f"{label:<30}{one_line(text)}" for label, text in self.rows()]
        judgement = self.judgement
        causes = [f"- {one_line(cause.seen)}: {one_line(cause.advice)}" for cause in judgement.causes]
        return "\n".join([*rows, *(f"note: {one_line(note)}" for note in self.notes), judgement.text, *causes])

    def _repr_html_(self) -> str:
        """The figures and the verdict for a notebook; every text is escaped."""
        judgement = self.judgement
        cells = "".join(f"<tr><th>{escape(label)}</th><td>{escape(text)}</td></tr>" for label, text in self.rows())
        causes = "".join(f"<li>{escape(cause.seen)}: {escape(cause.advice)}</li>" for cause in judgement.causes)
        notes = "".join(f"<p><small>{escape(note)}</small></p>" for note in self.notes)
        return f"<div><p><b>{escape(judgement.text)}</b></p><ul>{causes}</ul><table>{cells}</table>{notes}</div>"


def episode_to_show(groups: Sequence[Group]) -> Trajectory:
    """The best attempt of the first group with a signal; without one, the first attempt that was not spoilt."""
    for group in groups:
        if has_signal(group):
            return max(group.kept, key=lambda trajectory: trajectory.reward)
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    return next((trajectory for trajectory in trajectories if not trajectory.failed), trajectories[0])


def episode_parts(trajectory: Trajectory, decode: Callable[[Sequence[int]], str]) -> tuple[EpisodePart, ...]:
    """The tokens of an episode as text, span by span, each with its origin."""
    starts = {(turn.segment, turn.span): index for index, turn in enumerate(trajectory.turns)}
    parts, turn = [], -1
    for segment_index, segment in enumerate(trajectory.segments):
        for span_index, span in enumerate(segment):
            turn = starts.get((segment_index, span_index), turn)
            belongs = turn + 1 if span.origin == "context" else turn
            parts.append(EpisodePart(belongs, span.origin, len(span), decode(span.token_ids)))
    return tuple(parts)


def seconds(value: float) -> str:
    """Seconds with a digit where they are few."""
    return f"{value:.2g} s" if value < 10 else duration(value)


def _counted(value: float, one: str, many: str) -> str:
    return f"{value:.3g} {one if value == 1 else many}"


def mebibytes(count: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / MIB:,.0f} MiB" if count < 1024 * MIB else f"{count / (1024 * MIB):,.1f} GiB"


def _failed(trajectories: Sequence[Trajectory]) -> list[str]:
    return [f"{t.status}: {t.error or 'no reason given'}" for t in trajectories if t.failed]


def _malformed(trajectories: Sequence[Trajectory]) -> list[str]:
    turns = [turn for t in trajectories if not t.failed for turn in t.turns if turn.finish_reason == "stop"]
    return [turn.malformed for turn in turns if turn.malformed is not None]


def _truncated(trajectories: Sequence[Trajectory]) -> list[str]:
    found = [t for t in trajectories if t.status == "truncated"]
    cut = "a reply was cut off: rollout.max_new_tokens or max_sequence_tokens"
    out = "no turn or no room was left: rollout.max_turns or max_sequence_tokens"
    return [cut if trajectory.turns[-1].finish_reason == "length" else out for trajectory in found]


_REASONS: Mapping[str, Callable[[Sequence[Trajectory]], list[str]]] = {
    "malformed": _malformed,
    "truncated": _truncated,
    "failed": _failed,
}
