"""Which tokens of several sequences are the same computation: those with the same token and the same past.

A causal model gives two tokens the same states if they and all that precedes them are equal, so attempts at one task
need their prompt computed once, and samples of one episode all that they have in common. Laid on top of each other,
sequences form a tree; a node is a token that has to be computed, once.

Worked example, two sequences that part after three tokens:

    a b c x y      nodes 0 1 2 3 4      shared 0
    a b c z        nodes 0 1 2 5        shared 3
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """The tree of S sequences of T tokens in all.

    A sequence's new nodes are its last ones and have numbers that follow each other, because whatever begins with a
    node known already has only known nodes before it.
    """

    nodes: tuple[int, ...]  # [T] the node of each token, sequence after sequence; numbered as they are first met
    lengths: tuple[int, ...]  # [S]
    shared: tuple[int, ...]  # [S] how many first tokens of a sequence are nodes of earlier ones

    @property
    def num_nodes(self) -> int:
        """Tokens that have to be computed."""
        return len(self.nodes) - sum(self.shared)


def plan_prefixes(sequences: Iterable[Sequence[Hashable]]) -> PrefixPlan:
    """Lay `sequences` on top of each other. A symbol is whatever decides, with its past, what is computed of a token:
    its id, and the experts it is sent to where these are given."""
    children: dict[tuple[int, Hashable], int] = {}
    nodes: list[int] = []
    lengths: list[int] = []
    shared: list[int] = []
    for sequence in sequences:
        known, node = len(children), -1
        for symbol in sequence:
            node = children.setdefault((node, symbol), len(children))
            nodes.append(node)
        lengths.append(len(sequence))
        shared.append(len(sequence) - (len(children) - known))
    return PrefixPlan(tuple(nodes), tuple(lengths), tuple(shared))
