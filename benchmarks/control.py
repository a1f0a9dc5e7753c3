"""The control of every reinforcement result: the same run, but rewards are shuffled inside each group.

    make control SEED=0

is, from the repository's root,

    python -m keel quickstart --seed 0 --set algo.advantage=benchmarks.control:shuffled_group_mean

Advantages keep their sizes, their signs' shares and their sum of zero; what an attempt did no longer has anything to do
with what it is paid, so the expected gradient is zero and held-out success must not rise. What rises all the same is
owed to something else than the reward: a leak of answers, an evaluation that grew easier, the warm start's optimizer.
"""

from __future__ import annotations

import random
from hashlib import blake2b

import torch

from keel.algo.advantage import group_mean

__all__ = ["shuffled_group_mean"]


def shuffled_group_mean(rewards: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """`group_mean` of the group's rewards `[G]` in a random order, which `seed` and the rewards themselves decide.

    It depends on nothing else, so a run can be repeated and resumed. Over all groups an attempt keeps its own reward
    as often as it gets any other attempt's.
    """
    key = f"{seed}/{rewards.tolist()}".encode()
    draw = random.Random(int.from_bytes(blake2b(key, digest_size=8).digest(), "big"))
    order = list(range(rewards.numel()))
    draw.shuffle(order)
    return group_mean(rewards[order])
