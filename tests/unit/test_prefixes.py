"""Which tokens are the same computation, against a search through all pairs."""

from __future__ import annotations

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from keel.prefixes import plan_prefixes

SEQUENCES = st.lists(st.lists(st.integers(0, 2), max_size=9), max_size=8)


def common(one, other):
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@given(SEQUENCES)
def test_two_tokens_are_one_node_exactly_if_all_up_to_them_is_equal(sequences):
    plan = plan_prefixes(sequences)
    histories = [tuple(sequence[: place + 1]) for sequence in sequences for place in range(len(sequence))]
    assert len(plan.nodes) == len(histories)
    for node, history in zip(plan.nodes, histories, strict=True):
        for other, past in zip(plan.nodes, histories, strict=True):
            assert (node == other) == (history == past)
    assert plan.num_nodes == len(set(histories)) == len(set(plan.nodes))


@given(SEQUENCES)
def test_a_sequence_shares_its_longest_beginning_and_adds_nodes_in_a_row(sequences):
    plan = plan_prefixes(sequences)
    assert plan.lengths == tuple(map(len, sequences))
    known = 0
    for index, (start, stop) in enumerate(pairwise([0, *accumulate(plan.lengths)])):
        longest = max((common(sequences[index], other) for other in sequences[:index]), default=0)
        assert plan.shared[index] == longest
        own = plan.nodes[start + longest : stop]
        assert own == tuple(range(known, known + len(own)))
        assert all(node < known for node in plan.nodes[start : start + longest])
        known += len(own)


def test_what_else_tells_a_token_apart_is_part_of_its_symbol():
    plan = plan_prefixes([[(1, b"a"), (2, b"a")], [(1, b"a"), (2, b"b")], [(1, b"a"), (2, b"a")]])
    assert plan.nodes == (0, 1, 0, 2, 0, 1)
    assert plan.shared == (0, 1, 2)
    assert plan.num_nodes == 3
