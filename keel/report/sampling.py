"""Which steps and episodes a page of bounded size holds, and the sentence that says what it leaves out.

Steps come in an order of interest: the last, the first, where something went wrong, where reward or mismatch is
extreme, then evenly spaced ones. Each gets an equal share of what room is left, so a short step leaves its rest to the
next. Within a step whole groups come first, those whose rewards differ most; the episodes chosen for reading come
before all. An episode that is too long for its share keeps its messages and loses its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from keel.monitor.bands import MISMATCH
from keel.report.choice import OUTLIER_NATS, Candidate, candidates, choose
from keel.report.episodes import Json, RecordedStep, read_step, step_json, task_text, trajectory_json
from keel.report.plain import number, to_json
from keel.report.source import REINFORCEMENT
from keel.report.tokens import TokenText
from keel.runs import Run

MAX_STEPS = 24
"""Steps read for one page: each costs about ten milliseconds for 256 short episodes."""
MAX_READ_BYTES = 400_000_000
"""Records read for one page: long episodes make large records, and all that is read is held at once."""
MAX_ALARM_STEPS = 6
CHOSEN_SHARE = 3
"""The three chosen episodes together may take one part in so many of the room."""
LEAST_BYTES_A_TOKEN = 60
"""JSON of one token with its streams is longer than this: what cannot fit is not made."""
LONG = 4
"""An episode that needs more than one part in so many of its step's share is too long to be shown with tokens."""

Row = Mapping[str, Any]


def steps_in_order(
    recorded: Sequence[int], rows: Sequence[Row], troubled: Iterable[int], most: int | None
) -> list[int]:
    """Recorded steps, the most telling first; at most `most` (None: all). `troubled`: steps of alarms and findings."""
    if not recorded:
        return []
    known = set(recorded)
    trained = {row["step"]: row for row in rows if row["stage"] == REINFORCEMENT and row["step"] in known}
    order = [recorded[-1], recorded[0]]
    order += [step for step in dict.fromkeys(troubled) if step in known][:MAX_ALARM_STEPS]
    for name in ("reward/mean", MISMATCH):
        values = [(value, step) for step, row in trained.items() if (value := number(row.get(name))) is not None]
        if values:
            order += [max(values)[1], min(values)[1]] if name == "reward/mean" else [max(values)[1]]
    order = list(dict.fromkeys(order))[:most]
    places = len(recorded) if most is None else max(0, min(len(recorded), most) - len(order))
    order += [recorded[(index + 1) * (len(recorded) - 1) // (places + 1)] for index in range(places)]
    return list(dict.fromkeys(order if most is not None else [*order, *recorded]))


class Page:
    """Fills `steps` and `episodes` of the report, within `budget_bytes` of JSON (None: everything)."""

    def __init__(
        self, run: Run, words: TokenText | None, budget_bytes: int | None, max_steps: int, *, live: bool = False
    ) -> None:
        self.run = run
        self.words = words
        self.room = budget_bytes
        self.max_steps = max_steps
        self.live = live
        self.shown: dict[int, dict[int, Json]] = {}
        self.tokens_left_out = 0
        self.checked: list[bool] = []
        """Of each step read: do its two halves fit, so that no failed attempt was trained on?"""

    def fill(self, rows: Sequence[Row], troubled: Iterable[int], *, gap_limit: float = OUTLIER_NATS) -> dict[str, Any]:
        """`{"steps", "episodes", "sampling"}` of the run's records."""
        order = steps_in_order(self.run.steps, rows, troubled, None if self.room is None else self.max_steps)
        steps = self._read(order)
        self.checked = [step.is_matched for step in steps if step.record is not None]
        chosen = choose(candidates(steps), max(gap_limit, OUTLIER_NATS))
        by_number = {step.number: step for step in steps}
        limit = None if self.room is None else self.room // (CHOSEN_SHARE * max(1, len(chosen)))
        for candidate, _ in chosen.values():
            self._add(by_number[candidate.step], candidate.index, limit, limit)
        for place, step in enumerate(steps):
            self._fill_step(step, None if self.room is None else self.room // (len(steps) - place))
        return {
            "steps": {str(step.number): step_json(step, self.words, self.shown.get(step.number, {})) for step in steps},
            "episodes": _episodes(chosen),
            "sampling": self._said(steps, chosen),
        }

    def _read(self, order: Sequence[int]) -> list[RecordedStep]:
        """The steps of `order` that can be read, until their records together are larger than a page needs."""
        steps, size = [], 0
        for place, step in enumerate(order):
            size += _bytes_of(self.run, step)
            if self.room is not None and place > 0 and size > MAX_READ_BYTES:
                break
            if (read := read_step(self.run, step)) is not None:
                steps.append(read)
        return steps

    def _fill_step(self, step: RecordedStep, share: int | None) -> None:
        floor = None if self.room is None or share is None else self.room - share
        for _, indices in sorted(step.groups, key=lambda group: -_spread(step, group[1])):
            for index in indices:
                left = None if self.room is None or floor is None else self.room - floor
                if not self._add(step, index, left, share):
                    return

    def _add(self, step: RecordedStep, index: int, limit: int | None, share: int | None) -> bool:
        """Add a trajectory if it fits in `limit` bytes; False if not.

        One that would take more than a quarter of its step's whole `share` is added without its tokens.
        """
        shown = self.shown.setdefault(step.number, {})
        if index in shown:
            return True
        tokens = sum(len(view.streams["labels"]) for view in step.sequences.get(index, ()))
        long = share is not None and LEAST_BYTES_A_TOKEN * tokens > share // LONG
        hopeless = limit is not None and long and LEAST_BYTES_A_TOKEN * tokens > limit
        found, size = self._sized(step, index, with_tokens=not hopeless)
        if limit is not None and share is not None and size > limit and size > share // LONG:
            found, size = self._sized(step, index, with_tokens=False)
        if limit is not None and size > limit:
            return False
        shown[index] = found
        self.tokens_left_out += found["tokens"] is None and index in step.sequences
        self.room = None if self.room is None else self.room - size
        return True

    def _sized(self, step: RecordedStep, index: int, *, with_tokens: bool) -> tuple[Json, int]:
        """A trajectory, and the bytes that it and its place in its group take; 0 if nobody counts."""
        found = trajectory_json(step, index, self.words, with_tokens=with_tokens)
        if self.room is None:
            return found, 0
        group = step.trajectories[index].group_id
        is_first = not any(step.trajectories[other].group_id == group for other in self.shown[step.number])
        return found, len(to_json(found)) + 1 + is_first * (200 + 6 * len(task_text(step.trajectories[index])))

    def _said(self, steps: Sequence[RecordedStep], chosen: Mapping[str, Any]) -> str:
        recorded = len(self.run.steps)
        if self.live and recorded:
            return f"All {recorded:,} recorded steps can be read here in full: what is not here comes when asked for."
        if not recorded:
            return "No step was recorded (record.every), so there are no episodes to read."
        if not steps:
            return f"None of the {recorded:,} recorded steps can be read, so there are no episodes to show."
        episodes = sum(len(step.trajectories) for step in steps)
        shown = sum(map(len, self.shown.values()))
        if shown == episodes and len(steps) == recorded and not self.tokens_left_out:
            return (
                f"Everything is here: all {episodes:,} episodes of all {recorded:,} recorded steps, with their tokens."
            )
        told = [
            f"This page holds {shown:,} of the {episodes:,} episodes of {len(steps):,} of {recorded:,} recorded steps."
        ]
        if len(steps) < recorded:
            told.append(
                "Steps: the first, the last, those of alarms and of extreme reward or mismatch, and evenly spaced ones."
            )
        if shown < episodes:
            told.append("Of each step, the groups whose rewards differ most, as many as fit.")
        if self.tokens_left_out:
            told.append(f"{self.tokens_left_out:,} of the episodes shown are without their tokens, for size.")
        if chosen and len(steps) < recorded:
            told.append("Best, worst and strangest were chosen among the steps read.")
        told.append("keel report --serve shows everything.")
        return " ".join(told)


def _episodes(chosen: Mapping[str, tuple[Candidate, str]]) -> dict[str, Any]:
    names = ("best", "worst", "strangest")
    refs: dict[str, Any] = {name: chosen[name][0].ref if name in chosen else None for name in names}
    return refs | {"why": {name: chosen[name][1] for name in names if name in chosen}}


def _bytes_of(run: Run, step: int) -> int:
    file = run.paths.steps / f"{step:06d}.safetensors"
    return file.stat().st_size if file.is_file() else 0


def _spread(step: RecordedStep, indices: Sequence[int]) -> float:
    rewards = [step.trajectories[index].reward for index in indices if not step.trajectories[index].failed]
    return max(rewards, default=0.0) - min(rewards, default=0.0)
