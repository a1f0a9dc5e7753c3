"""Packing: what goes in comes out, shifted once; what failed never enters; order and split are fixed."""

from __future__ import annotations

import dataclasses
import pickle
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keel.batch import pack
from keel.types import (
    FAILED_STATUSES,
    MISSING_ROUTE,
    Group,
    Routes,
    SamplingSettings,
    Segment,
    Task,
    TokenSpan,
    Trajectory,
    Turn,
)
from tests.unpacking import unpack

LAYERS, TOP_K = 3, 2
STATUSES = ["completed", "truncated", *sorted(FAILED_STATUSES)]


@st.composite
def spans(draw):
    size = draw(st.integers(0, 6))
    token_ids = tuple(draw(st.lists(st.integers(0, 500), min_size=size, max_size=size)))
    origin = draw(st.sampled_from(["context", "policy", "demonstration"]))
    routes = None
    if draw(st.booleans()):
        values = draw(st.lists(st.integers(0, 30), min_size=size * LAYERS * TOP_K, max_size=size * LAYERS * TOP_K))
        routes = Routes(array("H", values).tobytes(), size, LAYERS, TOP_K)
    if origin != "policy":
        return TokenSpan(token_ids, origin, routed_experts=routes)
    logprobs = tuple(draw(st.lists(st.floats(-30, 0, width=32), min_size=size, max_size=size)))
    sampling = SamplingSettings(temperature=draw(st.sampled_from([0.5, 1.0])))
    return TokenSpan(token_ids, origin, logprobs, draw(st.integers(0, 9)), sampling, routes)


@st.composite
def groups(draw):
    made = []
    for index in range(draw(st.integers(0, 4))):
        task = Task(f"t{index}")
        attempts = []
        for attempt in range(draw(st.integers(1, 4))):
            segments = tuple(Segment(tuple(s)) for s in draw(st.lists(st.lists(spans(), max_size=4), max_size=2)))
            status = draw(st.sampled_from(STATUSES))
            reward = draw(st.floats(-2, 2, width=32))
            attempts.append(Trajectory(task, f"g{index}", attempt, (), (), segments, status, reward=reward))
        made.append(Group(f"g{index}", task, tuple(attempts)))
    return made


def expected_sequences(given_groups):
    """The slow twin: one list per sequence, token by token."""
    kept = [trajectory for group in given_groups for trajectory in group.kept]
    for index, trajectory in enumerate(kept):
        for order, segment in enumerate(trajectory.segments):
            rows = [
                (
                    token,
                    span.origin != "context",
                    span.logprobs[i] if span.logprobs is not None else 0.0,
                    -1 if span.policy_version is None else span.policy_version,
                    1.0 if span.sampling is None else span.sampling.temperature,
                    routes_of(span)[i],
                )
                for span in segment
                for i, token in enumerate(span.token_ids)
            ]
            if len(rows) > 1:
                yield index, order, rows


def routes_of(span):
    if span.routed_experts is None:
        return [[-1] * (LAYERS * TOP_K)] * len(span)
    values = array("H")
    values.frombytes(span.routed_experts.data)
    width = LAYERS * TOP_K
    return [list(values[i * width : (i + 1) * width]) for i in range(len(span))]


@settings(max_examples=80, deadline=None)
@given(groups(), st.integers(1, 30), st.integers(1, 4))
def test_unpacking_gives_back_what_was_packed(given_groups, max_tokens, num_updates):
    batch = pack(given_groups, max_tokens=max_tokens, num_updates=num_updates)
    expected = list(expected_sequences(given_groups))
    assert [(s.trajectory, s.segment) for s in unpack(batch)] == [(i, order) for i, order, _ in expected]
    any_drawn = any(m.rollout_logprobs is not None for m in batch.micro_batches)
    for sequence, (_, _, rows) in zip(unpack(batch), expected, strict=True):
        assert sequence.token_ids == tuple(row[0] for row in rows)
        assert sequence.loss_mask == tuple(row[1] for row in rows[1:])
        if any_drawn:
            assert sequence.rollout_logprobs == tuple(row[2] for row in rows[1:])
    flat = [row for _, _, rows in expected for row in rows[1:]]
    inputs = [row for _, _, rows in expected for row in rows[:-1]]
    streams = {
        name: [value for m in batch.micro_batches for value in getattr(m, name).tolist()]
        for name in ("input_ids", "labels", "policy_version", "temperature")
    }
    assert streams["input_ids"] == [row[0] for row in inputs]
    assert streams["labels"] == [row[0] for row in flat]
    assert streams["policy_version"] == [row[3] for row in flat]
    assert streams["temperature"] == [row[4] for row in flat]
    if batch.micro_batches and batch.micro_batches[0].routed_experts is not None:
        routes = torch.cat([m.routed_experts for m in batch.micro_batches]).flatten(1).tolist()
        assert routes == [row[5] for row in inputs]
    kept = [trajectory for group in given_groups for trajectory in group.kept]
    assert batch.rewards.tolist() == [trajectory.reward for trajectory in kept]
    assert batch.trajectory_ids == tuple(f"{t.group_id}/{t.attempt}" for t in kept)


@settings(max_examples=80, deadline=None)
@given(groups(), st.integers(1, 30), st.integers(1, 4))
def test_micro_batches_and_updates_are_well_formed(given_groups, max_tokens, num_updates):
    batch = pack(given_groups, max_tokens=max_tokens, num_updates=num_updates)
    for m in batch.micro_batches:
        lengths = m.cu_seqlens.diff()
        assert int(m.cu_seqlens[0]) == 0
        assert int(m.cu_seqlens[-1]) == m.num_tokens == sum(lengths.tolist())
        assert m.max_seqlen == int(lengths.max())
        assert m.positions.tolist() == [i for length in lengths.tolist() for i in range(length)]
        assert m.num_tokens <= max_tokens or m.num_sequences == 1
    bounds = batch.update_bounds
    assert bounds[0] == 0
    assert bounds[-1] == len(batch.micro_batches)
    assert batch.num_updates <= num_updates
    groups_of = []
    for index in range(batch.num_updates):
        own = batch.update(index)
        assert own or not batch.micro_batches
        assert batch.denominators[index] == sum(int(m.loss_mask.sum()) for m in own)
        trajectories = {int(t) for m in own for t in m.sequence_to_trajectory}
        groups_of.append({int(batch.trajectory_to_group[t]) for t in trajectories})
    present = set().union(*groups_of) if groups_of else set()
    assert sum(map(len, groups_of)) == len(present), "a group is in more than one update"
    if present:
        assert batch.num_updates == min(num_updates, len(present))
        assert max(map(len, groups_of)) - min(map(len, groups_of)) <= 1


def test_failed_attempts_never_enter(make_groups):
    (group,) = make_groups(1, 5)
    for status in FAILED_STATUSES:
        spoiled = dataclasses.replace(group.trajectories[2], status=status, reward=float("nan"))
        mixed = dataclasses.replace(group, trajectories=(*group.trajectories[:2], spoiled, *group.trajectories[3:]))
        batch = pack([mixed], max_tokens=1000)
        assert batch.trajectory_ids == tuple(f"group 0/{i}" for i in (0, 1, 3, 4))
        others = dataclasses.replace(group, trajectories=(*group.trajectories[:2], *group.trajectories[3:]))
        assert [s.token_ids for s in unpack(batch)] == [s.token_ids for s in unpack(pack([others], max_tokens=1000))]


@pytest.mark.parametrize("given_groups", [[], "all failed", "context only"])
def test_nothing_to_learn_from_is_an_outcome(given_groups, make_groups):
    if given_groups == "all failed":
        given_groups = [
            dataclasses.replace(
                g, trajectories=tuple(dataclasses.replace(t, status="env_error") for t in g.trajectories)
            )
            for g in make_groups(2, 2)
        ]
    elif given_groups == "context only":
        segment = Segment((TokenSpan((1, 2, 3), "context"),))
        trajectory = Trajectory(Task("t"), "g", 0, (), (), (segment,), "truncated")
        given_groups = [Group("g", Task("t"), (trajectory,))]
    batch = pack(given_groups, max_tokens=100, num_updates=3)
    assert batch.is_empty
    assert batch.num_updates == 1
    assert batch.denominators == (0.0,)
    assert batch.update(0) == batch.micro_batches


def test_a_reply_drawn_under_two_versions_is_one_turn():
    sampling = SamplingSettings()
    segment = Segment(
        (
            TokenSpan((1, 2), "context"),
            TokenSpan((3,), "policy", (-1.0,), 4, sampling),
            TokenSpan((4, 5), "policy", (-1.0, -2.0), 5, sampling),
            TokenSpan((6,), "context"),
            TokenSpan((7,), "policy", (-1.0,), 5, sampling),
        )
    )
    turns = (Turn((), "", "stop", 0, 1), Turn((), "", "stop", 0, 4))
    trajectory = Trajectory(Task("t"), "g", 0, (), turns, (segment,), "completed")
    (m,) = pack([Group("g", Task("t"), (trajectory,))], max_tokens=100).micro_batches
    assert m.turn.tolist() == [-1, 0, 0, 0, -1, 1]
    assert m.policy_version.tolist() == [-1, 4, 5, 5, -1, 5]


def test_the_route_of_an_input_stays_with_the_input():
    """Routes speak of the fed token, log-probs of the next one; the last token was never fed."""
    values = array("H", [7, 8, 9, MISSING_ROUTE])
    spans = (
        TokenSpan((1, 2), "context", routed_experts=Routes(values[:2].tobytes(), 2, 1, 1)),
        TokenSpan((3, 4), "policy", (-0.1, -0.2), 0, SamplingSettings(), Routes(values[2:].tobytes(), 2, 1, 1)),
    )
    trajectory = Trajectory(Task("t"), "g", 0, (), (), (Segment(spans),), "completed")
    (m,) = pack([Group("g", Task("t"), (trajectory,))], max_tokens=100).micro_batches
    assert m.routed_experts.flatten().tolist() == [7, 8, 9]
    assert m.loss_mask.tolist() == [False, True, True]
    assert m.rollout_logprobs.tolist() == [0.0, pytest.approx(-0.1), pytest.approx(-0.2)]


def test_refusals(make_groups):
    (group,) = make_groups(1, 2)
    broken = dataclasses.replace(group.trajectories[0], reward=float("inf"))
    with pytest.raises(ValueError, match=r"group 0/0.*reward is inf"):
        pack([dataclasses.replace(group, trajectories=(broken,))], max_tokens=10)
    greedy = TokenSpan((1, 2), "policy", (0.0, 0.0), 0, SamplingSettings(temperature=0.0))
    drawn = dataclasses.replace(group.trajectories[0], segments=(Segment((greedy,)),))
    with pytest.raises(ValueError, match="greedily"):
        pack([dataclasses.replace(group, trajectories=(drawn,))], max_tokens=10)
    with pytest.raises(ValueError, match="max_tokens"):
        pack([group], max_tokens=0)
    two_shapes = tuple(TokenSpan((1, 2), "context", routed_experts=Routes.missing(2, layers, 1)) for layers in (1, 2))
    odd = dataclasses.replace(group.trajectories[0], segments=(Segment(two_shapes),))
    with pytest.raises(ValueError, match="one shape"):
        pack([dataclasses.replace(group, trajectories=(odd,))], max_tokens=10)
    with pytest.raises(ValueError, match="keep the split"):
        pack([group], max_tokens=10).with_micro_batches([])
    with pytest.raises(IndexError, match="update 1"):
        pack([group], max_tokens=10).update(1)


def test_a_batch_travels_between_processes(make_groups):
    batch = pack(make_groups(16, 8), max_tokens=100)
    again = pickle.loads(pickle.dumps(batch))
    assert list(unpack(again)) == list(unpack(batch))
    # Each carries its own rows only: a view would carry the whole batch.
    assert len(batch.micro_batches) > 20
    assert len(pickle.dumps(batch.micro_batches[0])) < 10_000


def test_a_changed_mask_changes_the_denominator(make_groups):
    batch = pack(make_groups(), max_tokens=100, num_updates=2)
    first, *others = batch.micro_batches
    emptied = dataclasses.replace(first, loss_mask=torch.zeros_like(first.loss_mask))
    changed = batch.with_micro_batches([emptied, *others], {"x": 1.0})
    assert changed.denominators[0] == batch.denominators[0] - int(first.loss_mask.sum())
    assert changed.denominators[1] == batch.denominators[1]
    assert changed.metrics == {"x": 1.0}


def test_updates_take_groups_in_their_order(make_groups):
    batch = pack(make_groups(5, 2), max_tokens=64, num_updates=2)
    trained = [
        {int(batch.trajectory_to_group[i]) for part in batch.update(index) for i in part.sequence_to_trajectory}
        for index in range(batch.num_updates)
    ]
    assert trained == [{0, 1, 2}, {3, 4}]
