"""Is there a signal to learn from, and if not, why?

A group teaches something only if its attempts differ in reward: attempts that are all right, all wrong or all malformed
cancel out. The same judgement serves `keel rollout`, before a run, and the rule `no_signal`, during one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, Self

from keel.monitor.wilson import wilson_interval

Metrics = Mapping[str, float | int | None]

TOO_FEW = 0.10
"""Share of groups with a signal below which a run learns next to nothing from most of what it samples."""
THIN = 0.30
MOST = 0.5
SOME = 0.1
ALL = 0.95


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What became of some groups: counts, and sums over `kept` episodes (those that the world did not spoil)."""

    groups: int = 0
    with_signal: int = 0
    episodes: int = 0
    kept: int = 0
    replies: float = 0.0
    malformed: float = 0.0  # of the replies
    truncated: float = 0.0  # of the kept episodes
    reward: float = 0.0
    success: float = 0.0
    judged: int = 0  # kept episodes of steps in which the environment says what a success is

    @classmethod
    def of(cls, metrics: Metrics) -> Self:
        """Of one step's metrics under the names of the run directory (docs/loop.md).

        A group has a signal if any of its attempts got an advantage other than 0; where there are no advantages yet, if
        its rewards differ.
        """
        found = {name: float(value) for name, value in metrics.items() if value is not None}
        groups, episodes = round(found["rollout/groups"]), round(found["rollout/episodes"])
        kept = episodes - round(found["rollout/failed"])
        if "advantage/groups" in found:
            with_signal = round(found["advantage/groups"] * (1.0 - found["advantage/zero_share"]))
        else:
            with_signal = round(groups * found["rollout/signal_share"])
        return cls(
            groups=groups,
            with_signal=with_signal,
            episodes=episodes,
            kept=kept,
            replies=found["rollout/turns"] * kept,
            malformed=found["rollout/malformed"],
            truncated=found["rollout/truncated"],
            reward=found["reward/mean"] * kept,
            success=found.get("success", 0.0) * kept,
            judged=kept if "success" in found else 0,
        )

    def __add__(self, other: Outcomes) -> Outcomes:
        return Outcomes(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def signal_share(self) -> float:
        return self.with_signal / self.groups if self.groups else 0.0

    @property
    def failed_share(self) -> float:
        return 1.0 - self.kept / self.episodes if self.episodes else 0.0

    @property
    def malformed_share(self) -> float:
        return self.malformed / self.replies if self.replies else 0.0

    @property
    def truncated_share(self) -> float:
        return self.truncated / self.kept if self.kept else 0.0

    @property
    def success_share(self) -> float | None:
        return self.success / self.judged if self.judged else None

    @property
    def mean_reward(self) -> float:
        return self.reward / self.kept if self.kept else 0.0


@dataclass(frozen=True, slots=True)
class Cause:
    """Why groups carry no signal: what was seen, and what to do about it."""

    name: Literal["failing", "malformed", "truncated", "all_right", "all_wrong", "alike"]
    seen: str
    advice: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """Is there a signal? "good", "thin" (most groups teach nothing) or "none", why, and what to do."""

    level: Literal["good", "thin", "none"]
    text: str
    causes: tuple[Cause, ...] = ()


def judge(seen: Outcomes) -> Judgement:
    """Whether groups like these are worth training on. The interval is of the share of groups with a signal."""
    if seen.kept == 0:
        what = f"no signal: all {seen.episodes} episodes failed, and what the world spoils is no reward of 0"
        return Judgement("none", what, likely_causes(seen))
    low, high = wilson_interval(seen.with_signal, seen.groups)
    share = (
        f"{seen.with_signal} of {seen.groups} groups ({percent(seen.signal_share)}, 95 % interval "
        f"{percent(low)} to {percent(high)}) have attempts that differ in reward"
    )
    if seen.signal_share >= THIN:
        return Judgement("good", f"there is a signal to learn from: {share}", tuple(_spoilt(seen)))
    if seen.signal_share >= TOO_FEW:
        return Judgement("thin", f"a thin signal: {share}; the others teach nothing", likely_causes(seen))
    return Judgement("none", f"no signal: {share}", likely_causes(seen))


def likely_causes(seen: Outcomes) -> tuple[Cause, ...]:
    """What keeps attempts from differing, the most likely first; never empty."""
    spoilt, same = _spoilt(seen), _all_the_same(seen)
    # Where all are right, nothing else keeps attempts from differing; where most are unread, tasks are not to blame.
    unread = any(cause.name in ("malformed", "truncated") for cause in spoilt)
    right = [cause for cause in same if cause.name == "all_right"]
    wrong = [cause for cause in same if cause.name == "all_wrong" and not unread]
    causes = [*right, *spoilt, *wrong]
    if not causes:
        causes = [
            Cause(
                "alike",
                f"attempts at the same task get the same reward ({seen.mean_reward:.3g} in the mean)",
                "check that the reward looks at the reply; raise rollout.group_size or rollout.temperature, or let the "
                "reward tell good from better",
            )
        ]
    return tuple(causes)


def _spoilt(seen: Outcomes) -> list[Cause]:
    """Episodes that ended before they could be told apart."""
    causes = []
    if seen.failed_share >= SOME:
        causes.append(
            Cause(
                "failing",
                f"{percent(seen.failed_share)} of episodes failed in the environment or the engine",
                "mend what the first error names; failed attempts never count as a reward of 0",
            )
        )
    if seen.malformed_share >= MOST:
        causes.append(
            Cause(
                "malformed",
                f"{percent(seen.malformed_share)} of replies could not be read in the chat format",
                "start from a model that knows the format, or teach it first: warm_start.steps with demonstrations",
            )
        )
    if seen.truncated_share >= MOST:
        causes.append(
            Cause(
                "truncated",
                f"{percent(seen.truncated_share)} of episodes ran into a limit",
                "raise rollout.max_new_tokens, max_sequence_tokens or max_turns; a model that never stops needs a warm "
                "start instead",
            )
        )
    return causes


def _all_the_same(seen: Outcomes) -> list[Cause]:
    """Tasks that every attempt solves, or none."""
    success = seen.success_share
    if success is None or seen.kept == 0:
        return []
    if success >= ALL:
        what = f"{percent(success)} of attempts succeed: the tasks are too easy for this policy, or it has learned them"
        return [Cause("all_right", what, "give it harder tasks, or leave out those that it always solves")]
    if success <= 1.0 - ALL:
        what = f"{percent(success)} of attempts succeed: the tasks are too hard for this policy"
        advice = (
            "give it easier tasks first, a reward for partial success, more attempts (rollout.group_size) or a warm "
            "start; and check that the reward can be earned at all"
        )
        return [Cause("all_wrong", what, advice)]
    return []


def percent(share: float) -> str:
    """A share as "12 %"; below one in a hundred with a digit, so that little is not shown as none."""
    value = 100.0 * share
    if 0.0 < value < 1.0:
        return f"{value:.2g} %"
    return f"{100 - 0.1:.1f} %" if 99.5 < value < 100.0 else f"{value:.0f} %"
