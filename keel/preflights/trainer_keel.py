"""Keel's own learner as a trainer side: the batches of a run, through the learner's one way into the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch

from keel.batch import MicroBatch, pack
from keel.models.policy import PolicyModel
from keel.preflights.stack import ScoredSequence, TrainerScores
from keel.types import Group, Segment, Support, Task, TokenSpan, Trajectory


class KeelTrainer:
    """`TrainerSide` over a `PolicyModel`, packed as a step packs: micro-batches of at most `max_tokens` rows."""

    name = "keel"

    def __init__(self, policy: PolicyModel, *, max_tokens: int, dtype: str):
        self.policy, self.max_tokens, self.dtype = policy, max_tokens, dtype
        self.model, self.info = policy.model, policy.info
        self.attention = str(policy.model.config._attn_implementation)
        self.device = next(policy.parameters()).device

    @property
    def packs(self) -> bool:
        """Whether several sequences share a micro-batch; else the learner gives each one of its own."""
        return self.policy._packs

    def score(self, sequences: Sequence[ScoredSequence], *, with_routes: bool = False) -> list[TrainerScores]:
        """As in a step; with `with_routes` expert choices and how near a tie they were, where the model has routers."""
        found: list[TrainerScores] = []
        routed = with_routes and self.info.num_moe_layers > 0 and len(self.policy.routers) == self.info.num_moe_layers
        for micro_batch in self.micro_batches(sequences):
            with torch.no_grad():
                out = self.policy(micro_batch, with_entropy=False, with_routes=routed, with_margins=routed)
            bounds = micro_batch.cu_seqlens.tolist()
            for first, last in pairwise(bounds):
                rows = slice(first, last)
                found.append(
                    TrainerScores(
                        _with_first(out.logprobs[rows]),
                        None if out.routes is None else out.routes[rows].cpu().numpy().astype(np.int32),
                        None if out.route_margins is None else out.route_margins[rows].float().cpu().numpy(),
                    )
                )
        return found

    def score_alone(self, sequence: ScoredSequence) -> TrainerScores:
        return self.score([sequence])[0]

    def loss_gradient(self, sequences: Sequence[ScoredSequence]) -> Mapping[str, float]:
        """Norms of the gradient of the summed drawn log-probs; adapters aside, every parameter takes part."""
        frozen = [parameter for parameter in self.model.parameters() if not parameter.requires_grad]
        kept = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            self.model.zero_grad(set_to_none=True)
            for micro_batch in self.micro_batches(sequences):
                self.policy(micro_batch, with_entropy=False).logprobs[micro_batch.loss_mask].sum().backward()
            return {
                name: 0.0 if parameter.grad is None else float(parameter.grad.float().norm())
                for name, parameter in self.model.named_parameters()
            }
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            for name, parameter in self.model.named_parameters():
                parameter.grad = kept[name]

    def micro_batches(self, sequences: Sequence[ScoredSequence]) -> Iterator[MicroBatch]:
        """The sequences as a step's micro-batches, in their order."""
        groups = [
            Group("probe", Task("probe"), tuple(_trajectory(index, each) for index, each in enumerate(sequences)))
        ]
        batch = pack(groups, max_tokens=self.max_tokens if self.packs else 1)
        for micro_batch in batch.micro_batches:
            yield micro_batch.to(self.device)


def _with_first(logprobs: torch.Tensor) -> np.ndarray:
    values: np.ndarray = logprobs.detach().float().cpu().numpy()
    return np.concatenate([np.full(1, np.nan, np.float32), values])


def _trajectory(index: int, sequence: ScoredSequence) -> Trajectory:
    spans = tuple(_spans(sequence))
    return Trajectory(Task("probe"), "probe", index, (), (), (Segment(spans),), "completed")


def _spans(sequence: ScoredSequence) -> Iterator[TokenSpan]:
    """Runs of drawn and of other tokens; log-probs of the drawn ones are not what is asked here, so they are 0."""
    drawn, tokens = sequence.drawn, sequence.token_ids
    edges = [0, *(int(i) + 1 for i in np.flatnonzero(drawn[1:] != drawn[:-1])), len(tokens)]
    row = 0
    for start, stop in pairwise(edges):
        ids = tuple(int(token) for token in tokens[start:stop])
        if not drawn[start]:
            yield TokenSpan(ids, "context")
            continue
        support = None if sequence.support is None else _rows(sequence.support, row, row + len(ids))
        row += len(ids)
        yield TokenSpan(ids, "policy", (0.0,) * len(ids), 0, sequence.sampling, support=support)


def _rows(support: Support, start: int, stop: int) -> Support:
    first, last = 4 * sum(support.counts[:start]), 4 * sum(support.counts[:stop])
    return Support(support.counts[start:stop], support.ids[first:last])
