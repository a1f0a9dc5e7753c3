"""A problem small enough to enumerate: three tokens, at most three of them, two attempts at one task.

A policy is a table of logits, one row for each of the seven prefixes that have not ended; token 0 ends a sequence.
`Expectation` runs Keel's own packing, correction, advantage, loss and reduction on every pair of sequences that an
engine could draw and adds the gradients up with their probabilities: no sampling, no approximation. The truth is made
here from the definition of a softmax, sequence by sequence, with numpy alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from keel.algo.apply import add_advantages, correct, set_reduction
from keel.algo.correction.base import BoundCorrection
from keel.algo.losses import LossInputs
from keel.algo.reduce import reduce_loss
from keel.algo.reduction import Reduction
from keel.batch import PackedBatch, pack
from keel.types import Group, SamplingSettings, Segment, Task, TokenSpan, Trajectory

NUM_TOKENS, MAX_LENGTH, PROMPT = 3, 3, 3
PREFIXES = [p for n in range(MAX_LENGTH) for p in itertools.product((1, 2), repeat=n)]
SEQUENCES = [
    (*prefix, token)
    for prefix in PREFIXES
    for token in range(NUM_TOKENS)
    if token == 0 or len(prefix) == MAX_LENGTH - 1
]
LENGTHS = np.array([len(sequence) for sequence in SEQUENCES])
STATES = [[PREFIXES.index(sequence[:t]) for t in range(len(sequence))] for sequence in SEQUENCES]
SHAPE = (len(PREFIXES), NUM_TOKENS)

Loss = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


def table(seed: int, scale: float = 1.0) -> np.ndarray:
    """Logits of a policy, `[7, 3]`."""
    return scale * np.random.default_rng(seed).standard_normal(SHAPE)


def rewards(seed: int) -> np.ndarray:
    """A reward for each sequence, in eighths, so that float32 has them exactly; some sequences share theirs."""
    return np.random.default_rng(seed).integers(-4, 9, len(SEQUENCES)) / 8.0


def token_logprobs(logits: np.ndarray) -> list[np.ndarray]:
    """For each sequence, the log-prob of each of its tokens."""
    shifted = logits - logits.max(1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return [logprobs[STATES[i], list(sequence)] for i, sequence in enumerate(SEQUENCES)]


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Of each sequence; they add up to 1."""
    return np.array([np.exp(logprobs.sum()) for logprobs in token_logprobs(logits)])


def token_scores(logits: np.ndarray) -> list[np.ndarray]:
    """For each sequence, `[n, 7, 3]`: the gradient of each token's log-prob, one-hot minus softmax in its own row."""
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = []
    for sequence, states in zip(SEQUENCES, STATES, strict=True):
        scores = np.zeros((len(sequence), *SHAPE))
        for t, (state, token) in enumerate(zip(states, sequence, strict=True)):
            scores[t, state] = -softmax[state]
            scores[t, state, token] += 1.0
        found.append(scores)
    return found


def policy_gradient(logits: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """The gradient of the expected reward: sum over sequences of p r grad log p."""
    scores = np.array([each.sum(0) for each in token_scores(logits)])
    return np.einsum("n,n,nij->ij", probabilities(logits), reward, scores)


def trajectory(index: int, reward: float, logprobs: np.ndarray, attempt: int) -> Trajectory:
    drawn = TokenSpan(SEQUENCES[index], "policy", tuple(logprobs), 0, SamplingSettings())
    segment = Segment((TokenSpan((PROMPT,), "context"), drawn))
    return Trajectory(Task("only"), "group", attempt, (), (), (segment,), "completed", reward=reward)


@dataclass(frozen=True)
class Expectation:
    """What an estimator of Keel's gives on average: `policy` learns from pairs that `engine` drew.

    Without a `reduction` the loss is a sum over tokens, divided by nothing.
    """

    policy: np.ndarray
    engine: np.ndarray
    reward: np.ndarray
    advantage: Callable[..., torch.Tensor]
    loss: Loss
    corrections: Sequence[BoundCorrection] = ()
    old: np.ndarray | None = None  # logits of the policy before the first update; None: this is the first
    reduction: Callable[..., Reduction] | None = None
    trust_regions: Sequence[Callable[[LossInputs], torch.Tensor]] = ()
    rejected_in_baseline: bool = False
    whiten: bool = False

    def gradient(self) -> np.ndarray:
        """The expected gradient of the loss, `[7, 3]`."""
        chances = probabilities(self.engine)
        total = np.zeros(SHAPE)
        for first, second in itertools.product(range(len(SEQUENCES)), repeat=2):
            total += chances[first] * chances[second] * self.of_pair(first, second)
        return total

    def of_pair(self, *pair: int) -> np.ndarray:
        """The gradient that Keel computes from one group."""
        batch = self.batch(pair)
        if batch.is_empty:
            return np.zeros(SHAPE)
        logits = torch.tensor(self.policy, requires_grad=True)
        (micro_batch,) = batch.micro_batches
        assert micro_batch.old_logprobs is not None
        logprobs = _row_logprobs(logits, pair)
        # In a first update the old log-probs are the current ones, detached; the batch then has them to 1e-17.
        old = logprobs.detach() if self.old is None else micro_batch.old_logprobs
        m = micro_batch
        inputs = LossInputs(logprobs, old, m.loss_mask, m.advantages, m.rollout_logprobs, m.row_to_sequence)
        per_token, _ = self.loss(inputs)
        for region in self.trust_regions:
            per_token = torch.where(region(inputs), per_token, torch.zeros_like(per_token))
        weights, denominator = m.importance_weights, 1.0
        if self.reduction is not None:
            assert batch.loss_denominators is not None
            (denominator,) = batch.loss_denominators
            if m.loss_weights is not None:
                weights = m.loss_weights if weights is None else weights * m.loss_weights
        reduce_loss(per_token, m.loss_mask, denominator, weights).backward()
        assert logits.grad is not None
        return logits.grad.numpy()

    def batch(self, pair: Sequence[int]) -> PackedBatch:
        """The pair through Keel's packing, correction and advantage, in float64."""
        drawn = token_logprobs(self.engine)
        attempts = [trajectory(i, float(self.reward[i]), drawn[i], order) for order, i in enumerate(pair)]
        batch = pack([Group("group", Task("only"), tuple(attempts))], max_tokens=64)
        (micro_batch,) = batch.micro_batches
        old = token_logprobs(self.policy if self.old is None else self.old)
        scored = replace(
            micro_batch,
            rollout_logprobs=torch.tensor(np.concatenate([drawn[i] for i in pair])),
            old_logprobs=torch.tensor(np.concatenate([old[i] for i in pair])),
        )
        batch = replace(batch.with_micro_batches([scored]), rewards=batch.rewards.double())
        batch = correct(batch, self.corrections)
        options = {"rejected_in_baseline": self.rejected_in_baseline, "whiten": self.whiten}
        batch = add_advantages(batch, self.advantage, {}, **options)
        return batch if self.reduction is None else set_reduction(batch, self.reduction, {})


def _row_logprobs(logits: torch.Tensor, pair: Sequence[int]) -> torch.Tensor:
    states = [state for i in pair for state in STATES[i]]
    tokens = [token for i in pair for token in SEQUENCES[i]]
    return logits.log_softmax(-1)[states, tokens]
