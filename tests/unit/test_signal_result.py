"""What `keel rollout` prints, writes and shows is what the episodes were; text of others is never more than text."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from keel.cli.rollout import ABRIDGED, as_text, print_result
from keel.rollouts.metrics import rollout_metrics
from keel.signal_result import MIB, MemoryUse, Projection, RolloutResult, episode_parts, episode_to_show
from keel.types import Group, Message, SamplingSettings, Segment, Task, TokenSpan, Trajectory, Turn
from tests.hostile import SMALL

SAMPLING = SamplingSettings()
MEMORY = MemoryUse(planned=100 * MIB, before=200 * MIB, peak=500 * MIB, machine=4096 * MIB)


def drawn(*ids):
    return TokenSpan(ids, "policy", (-1.0,) * len(ids), 0, SAMPLING)


def context(*ids):
    return TokenSpan(ids, "context")


def attempt(reward=0.0, *, task="t", attempt=0, status="completed", error=None, malformed=None, success=None, **values):
    """Two replies; the second prompt is rendered anew, in a segment of its own."""
    turns = (
        Turn((Message("assistant", "a"),), "a", "stop", segment=0, span=1),
        Turn((Message("assistant", "b"),), "b", "stop", segment=1, span=1, malformed=malformed),
    )
    segments = (Segment((context(1, 2), drawn(3), context(4))), Segment((context(1, 4), drawn(5, 6))))
    return Trajectory(
        Task(task), "g", attempt, (), turns, segments, status, reward, success=success, error=error, **values
    )


def result(*groups, decode=lambda ids: " ".join(map(str, ids)), **values):
    made = [Group(str(number), group[0].task, tuple(group)) for number, group in enumerate(groups)]
    shown = episode_to_show(made)
    return RolloutResult(
        groups=tuple(made),
        metrics={**rollout_metrics(made, 2.0), **values},
        projection=Projection(rollout_s=4.0, learn_s=values.get("time/learn_s"), overlapping=False, steps=100),
        memory=MEMORY,
        shown=shown,
        episode=episode_parts(shown, decode),
    )


def printed(found, *, whole=True, terminal=False):
    console = Console(file=io.StringIO(), highlight=False, width=300, force_terminal=terminal)
    with console.capture() as captured:
        print_result(found, console, whole=whole)
    return captured.get()


def test_tokens_are_shown_in_order_each_with_its_origin_and_turn():
    parts = episode_parts(attempt(), lambda ids: " ".join(map(str, ids)))
    assert [(part.turn, part.origin, part.num_tokens, part.text) for part in parts] == [
        (0, "context", 2, "1 2"),
        (0, "policy", 1, "3"),
        (1, "context", 1, "4"),
        (1, "context", 2, "1 4"),
        (1, "policy", 2, "5 6"),
    ]
    text = printed(result([attempt(1.0), attempt(0.0)]))
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[2:6] == ["turn 1, context, 2 tokens", "c| 1 2", "turn 1, policy, 1 tokens", "p> 3"]


def test_the_episode_shown_is_the_best_of_a_group_with_a_signal():
    best = attempt(3.0, task="b", attempt=1)
    found = result([attempt(9.0, task="a"), attempt(9.0, task="a")], [attempt(1.0, task="b"), best])
    assert found.shown == best
    failed = attempt(status="env_error", error="gone")
    assert result([failed, attempt(0.5, attempt=1)]).shown.attempt == 1
    assert result([failed, failed]).shown == failed


def test_figures():
    """Three of four attempts right, one group of two with a signal; learned from once."""
    right, wrong = attempt(1.0, success=True), attempt(0.0, success=False)
    learned = {"policy/loss": 0.0, "policy/recompute_max_dev": 0.0, "mismatch/abs_mean": 1e-7, "time/learn_s": 3.0}
    found = result([right, right], [right, wrong], **learned)
    rows = dict(found.rows())
    assert rows["episodes"] == "4 (2 tasks)"
    assert rows["success"] == "75 % (95 % interval 30 % to 95 %)"
    assert rows["groups whose rewards differ"] == "1 of 2 (50 %)"
    assert rows["an episode"] == "2 replies, 8 tokens, 3 of them drawn"
    assert rows["all together"] == "2 s: 0.5 s per episode, 6 tokens drawn per second"
    assert rows["learner twice"] == "equal to the bit"
    assert rows["a training step"] == "about 7 s: rollouts 4 s + learner 3 s"
    assert rows["100 steps"] == "about 11 min 40 s"
    assert rows["memory"] == "planned 100 MiB; held 500 MiB, 200 MiB of it before the model; there is 4.0 GiB"
    assert found.judgement.level == "good"
    again = dict(result([right, wrong], **{**learned, "policy/recompute_max_dev": 0.25}).rows())
    assert again["learner twice"] == "ratio off 1 by up to 0.25"


def test_without_a_learner_nothing_is_said_of_it():
    rows = dict(result([attempt(1.0), attempt(0.0)]).rows())
    assert rows["a training step"] == "rollouts 4 s"
    assert not {"learner twice", "engine against learner", "100 steps"} & rows.keys()


def test_rollouts_in_the_background_cost_only_what_the_learner_does_not_cover():
    assert Projection(rollout_s=4.0, learn_s=3.0, overlapping=True, steps=1).step_s == 4.0
    assert Projection(rollout_s=4.0, learn_s=5.0, overlapping=True, steps=1).step_s == 5.0
    assert Projection(rollout_s=4.0, learn_s=None, overlapping=True, steps=1).step_s is None


def test_reasons_are_the_most_frequent_and_counted():
    failed = [attempt(status="env_error", error=text) for text in ("b", "a", "b", "c", "d", "a", "b")]
    found = result([*failed, attempt(malformed="no end"), attempt(status="truncated")])
    assert found.reasons("failed") == [("env_error: b", 3), ("env_error: a", 2), ("env_error: c", 1)]
    assert found.reasons("malformed") == [("no end", 1)]
    assert [count for _, count in found.reasons("truncated")] == [1]
    assert dict(found.rows())["failed episodes"] == "78 %: env_error: b (3x); env_error: a (2x); env_error: c (1x)"


def test_if_every_episode_failed_there_are_no_figures_of_one():
    found = result([attempt(status="env_error", error="gone")] * 3)
    rows = dict(found.rows())
    assert rows["reward"] == "none: every episode failed"
    assert "an episode" not in rows
    assert found.success is None
    assert found.judgement.text.startswith("no signal: all 3 episodes failed")
    assert "env_error (gone)" in printed(found).splitlines()[0]


def test_json_has_the_figures(tmp_path):
    value = json.loads(json.dumps(result([attempt(1.0, success=True), attempt(0.0, success=False)]).to_json()))
    assert value["schema_version"] == 1
    assert (value["groups"], value["episodes"], value["signal_share"]) == (1, 2, 1.0)
    assert value["success"]["share"] == 0.5
    assert value["verdict"]["level"] == "good"
    assert value["projection"]["step_s"] is None
    assert value["metrics"]["rollout/episodes"] == 2


def test_long_texts_are_cut_unless_all_is_asked_for():
    found = result([attempt(1.0), attempt(0.0)], decode=lambda ids: "x" * (ABRIDGED + 77))
    assert "[77 more characters]" in as_text(found)
    assert "more characters" not in as_text(found, whole=True)
    assert as_text(found, whole=True).count("x") >= 5 * (ABRIDGED + 77)


def test_a_result_prints_its_figures_and_verdict_and_no_episode():
    found = result([attempt(1.0, task="a long prompt " * 5000)])
    assert len(repr(found)) < 5000
    assert len(str(found)) < 5000
    assert found.judgement.text in str(found)
    assert "long prompt" not in str(found)


OURS = ("c| ", "p> ", "   ", "episode: ", "could not be read: ", "turn ", "no signal", "- ", "  what")
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize("name", SMALL)
def test_text_of_others_is_never_more_than_text(name):
    """In the headline, the tokens, the reasons: no control codes but rich's own colours, no line of its own."""
    text = SMALL[name]
    bad = attempt(1.0, task=text, malformed=text, reward_parts={text: 1.0})
    found = result([bad, attempt(status="env_error", error=text)], decode=lambda ids: text)
    shown = ESCAPE.sub("", printed(found, terminal=True))
    assert not [char for char in shown if not char.isprintable() and char != "\n"]
    for line in shown.splitlines():
        ours = line.startswith(OURS)
        assert ours or line.rstrip() in ("", "c|", "p>") or line.split("  ")[0] in dict(found.rows()), line
    for line in str(found).splitlines():
        assert line.isprintable()
        assert line.split("  ")[0] in dict(found.rows()) or line.startswith(("no signal", "- ", "note: ")), line
    html = found._repr_html_()
    assert set(re.findall(r"<[^>]*>", html)) <= {
        *("<div>", "</div>", "<p>", "</p>", "<b>", "</b>", "<ul>", "</ul>", "<li>", "</li>"),
        *("<table>", "</table>", "<tr>", "</tr>", "<th>", "</th>", "<td>", "</td>", "<small>", "</small>"),
    }
