"""Faults of what a learner is fed and of what it makes of it: tokens, positions, temperatures, labels."""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch

from keel.batch import MicroBatch
from keel.distortion import Distortion
from keel.models.distorted.tokens import TOKEN_CAUSES, Reply, Splits, drawn_for, shift, shown
from keel.models.policy import TokenOutputs
from keel.models.router import replay_routes, replayed

BFLOAT16_ROUNDING = 2.0**-9
_ABOUT_INPUTS = {"routes": -1, "own_routes": -1, "route_margins": torch.inf, "router_logits": 0.0}


@dataclass(frozen=True)
class ShownBatch:
    """What the model is fed in the place of a micro-batch, and how its rows are told in the rows of that one.

    `label_rows[i]` is the row whose label row i of `micro_batch` speaks of, `input_rows[i]` the one whose input it is
    fed; -1 for none. None: the rows are the same.
    """

    micro_batch: MicroBatch
    num_rows: int
    label_rows: torch.Tensor | None = None
    input_rows: torch.Tensor | None = None

    def replaying(self) -> AbstractContextManager[None]:
        """Routes that are replayed in this context, for the rows that are fed."""
        routes = replayed()
        if routes is None or self.input_rows is None:
            return nullcontext()
        known = (self.input_rows >= 0)[:, None, None]
        return replay_routes(torch.where(known, routes[self.input_rows.clamp(min=0)], -1))

    def told(self, outputs: TokenOutputs) -> TokenOutputs:
        """Log-probs of a label told in two tokens are added up; of a label left out, it is 0 without gradient."""
        if self.label_rows is None or self.input_rows is None:
            return outputs
        known = self.label_rows >= 0
        target = self.label_rows[known]
        logprobs = outputs.logprobs.new_zeros(self.num_rows).index_add(0, target, outputs.logprobs[known])
        entropy = outputs.entropy
        if entropy is not None:
            entropy = entropy.new_zeros(self.num_rows).index_add(0, target, entropy[known])
        streams = {name: self._by_input(getattr(outputs, name), unknown) for name, unknown in _ABOUT_INPUTS.items()}
        differs = outputs.support_differs
        if differs is not None:
            told = differs.new_zeros(self.num_rows)
            told[target] = differs[known]
            differs = told
        changed: dict[str, Any] = {**streams, "support_differs": differs, "own_support": None}
        return replace(outputs, logprobs=logprobs, entropy=entropy, **changed)

    def _by_input(self, stream: torch.Tensor | None, unknown: float) -> torch.Tensor | None:
        if stream is None or self.input_rows is None:
            return stream
        told = stream.new_full((self.num_rows, *stream.shape[1:]), unknown)
        known = self.input_rows >= 0
        told[self.input_rows[known]] = stream[known]
        return told


def show(
    micro_batch: MicroBatch, distortions: Sequence[Distortion], *, splits: Splits, pad_token_id: int
) -> ShownBatch:
    """`micro_batch` as the faulty learner is fed it."""
    seen = micro_batch
    for each in distortions:
        if each.cause == "wrong_temperature":
            warmer = seen.temperature * (1 + each.strength)
            seen = replace(seen, temperature=torch.where(seen.loss_mask, warmer, seen.temperature))
        elif each.cause == "raw_logprobs":
            rows = _rows_of_replies(seen, each)
            seen = replace(seen, temperature=torch.where(rows, torch.ones_like(seen.temperature), seen.temperature))
            seen = _without_support(seen, rows)
        elif each.cause == "top_p_not_undone":
            seen = replace(seen, support_ids=None, support_offsets=None)
        elif each.cause == "wrong_padding" and each.group == "positions":
            seen = replace(seen, positions=seen.positions + int(each.strength) * _after_prompt(seen))
    if not any(each.cause in TOKEN_CAUSES and each.group != "positions" for each in distortions):
        return ShownBatch(seen, micro_batch.num_tokens)
    return _retold(seen, distortions, splits, pad_token_id)


def distorted_outputs(
    logprobs: torch.Tensor, micro_batch: MicroBatch, distortions: Sequence[Distortion]
) -> torch.Tensor:
    """`logprobs [T]` standing at other tokens of their reply, or with noise of the size of a rounding."""
    for each in distortions:
        if each.cause == "shifted_logprobs":
            places = torch.arange(micro_batch.num_tokens)
            for rows, _ in replies_of(micro_batch):
                places[rows.start : rows.stop] = torch.tensor(shift(range(rows.start, rows.stop), int(each.strength)))
            logprobs = logprobs[places.to(logprobs.device)]
        elif each.cause == "bfloat16_noise" and each.group == "logprobs":
            factors = torch.ones_like(logprobs)
            for rows, tokens in replies_of(micro_batch):
                drawn = random.Random(f"{each.seed}/{zlib.crc32(array('q', tokens).tobytes())}")
                noise = [1 + each.strength * BFLOAT16_ROUNDING * drawn.gauss(0.0, 1.0) for _ in tokens]
                factors[rows.start : rows.stop] = torch.tensor(noise, dtype=factors.dtype)
            logprobs = logprobs * factors
    return logprobs


def replies_of(micro_batch: MicroBatch) -> Iterator[tuple[Reply, list[int]]]:
    """Each reply: its rows (as a range), and the tokens drawn, which are those rows' labels."""
    labels, learned = micro_batch.labels.tolist(), micro_batch.loss_mask.tolist()
    turns = micro_batch.turn.tolist()
    for start, stop in pairwise(micro_batch.cu_seqlens.tolist()):
        row = start
        while row < stop:
            last = row
            while last < stop and learned[last] and turns[last] == turns[row]:
                last += 1
            if last > row:
                yield Reply(row, last), labels[row:last]
            row = max(last, row + 1)


def _rows_of_replies(micro_batch: MicroBatch, distortion: Distortion) -> torch.Tensor:
    """[T] bool, the replies that are among the share of `distortion`."""
    rows = torch.zeros_like(micro_batch.loss_mask)
    for reply, tokens in replies_of(micro_batch):
        if drawn_for(distortion, tokens):
            rows[reply.start : reply.stop] = True
    return rows


def _after_prompt(micro_batch: MicroBatch) -> torch.Tensor:
    """[T] int64, 1 for inputs from a sequence's first drawn token on."""
    after = torch.zeros_like(micro_batch.positions)
    ends = dict(pairwise(micro_batch.cu_seqlens.tolist()))
    first: dict[int, int] = {}
    for reply, _ in replies_of(micro_batch):
        start = max(begin for begin in ends if begin <= reply.start)
        first.setdefault(start, reply.start)
    for start, row in first.items():
        after[row + 1 : ends[start]] = 1
    return after


def _without_support(micro_batch: MicroBatch, rows: torch.Tensor) -> MicroBatch:
    """Nothing was cut in `rows`, as far as the batch says."""
    return _support_of_rows(micro_batch, micro_batch, torch.arange(micro_batch.num_tokens), ~rows.cpu())


def _support_of_rows(source: MicroBatch, into: MicroBatch, rows: torch.Tensor, kept: torch.Tensor) -> MicroBatch:
    """`into` with the supports of `rows` of `source`, empty (nothing cut) where not `kept`."""
    if source.support_ids is None or source.support_offsets is None:
        return into
    offsets = source.support_offsets.tolist()
    parts = [
        source.support_ids[offsets[row] : offsets[row + 1]] if keep else source.support_ids[:0]
        for row, keep in zip(rows.tolist(), kept.tolist(), strict=True)
    ]
    sizes = torch.tensor([0, *(part.shape[0] for part in parts)])
    return replace(into, support_ids=torch.cat(parts), support_offsets=sizes.cumsum(0).to(source.support_offsets))


def _retold(
    micro_batch: MicroBatch, distortions: Sequence[Distortion], splits: Splits, pad_token_id: int
) -> ShownBatch:
    """Each sequence with its tokens in pieces; see `keel.models.distorted.tokens`."""
    inputs, labels = micro_batch.input_ids.tolist(), micro_batch.labels.tolist()
    replies = [reply for reply, _ in replies_of(micro_batch)]
    tokens: list[int] = []  # of the rows that are fed
    answers: list[int] = []
    label_rows: list[int] = []
    input_rows: list[int] = []
    lengths: list[int] = []
    for start, stop in pairwise(micro_batch.cu_seqlens.tolist()):
        own = [Reply(r.start - start + 1, r.stop - start + 1) for r in replies if start <= r.start < stop]
        whole = [*inputs[start:stop], labels[stop - 1]]
        seen = shown(whole, own, distortions, splits=splits, pad_token_id=pad_token_id, without_stops=True)
        if len(seen.tokens) < 2:
            seen = shown(whole, own, (), splits=splits, pad_token_id=pad_token_id)
        tokens += seen.tokens[:-1]
        answers += seen.tokens[1:]
        label_rows += [start + owner - 1 if owner > 0 else -1 for owner in seen.owners[1:]]
        input_rows += [start + owner if 0 <= owner < stop - start else -1 for owner in seen.owners[:-1]]
        lengths.append(len(seen.tokens) - 1)
    device = micro_batch.input_ids.device
    labelled = torch.tensor(label_rows)
    fed = _like(micro_batch, labelled.clamp(min=0), torch.tensor(lengths), max(lengths))
    fed = replace(fed, input_ids=torch.tensor(tokens, device=device), labels=torch.tensor(answers, device=device))
    same = (labelled >= 0) & (fed.labels.cpu() == micro_batch.labels.cpu()[labelled.clamp(min=0)])
    fed = _support_of_rows(micro_batch, fed, labelled.clamp(min=0), same)
    return ShownBatch(fed, micro_batch.num_tokens, labelled.to(device), torch.tensor(input_rows, device=device))


def _like(micro_batch: MicroBatch, rows: torch.Tensor, lengths: torch.Tensor, longest: int) -> MicroBatch:
    """A micro-batch of sequences of `lengths`, each stream taken from `rows` of the given one; positions begin at 0."""
    device = micro_batch.input_ids.device
    per_row: dict[str, Any] = {
        item.name: value[rows.to(device)]
        for item in fields(micro_batch)
        if isinstance(value := getattr(micro_batch, item.name), torch.Tensor)
        and value.shape[0] == micro_batch.num_tokens
        and item.name not in _PER_SEQUENCE
    }
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    places = torch.arange(int(ends[-1])) - torch.repeat_interleave(ends[:-1], lengths)
    return replace(
        micro_batch,
        **per_row | {"positions": places.to(device)},
        cu_seqlens=ends.to(micro_batch.cu_seqlens),
        max_seqlen=longest,
        support_ids=None,
        support_offsets=None,
    )


_PER_SEQUENCE = ("cu_seqlens", "sequence_to_trajectory", "sequence_to_segment", "support_ids", "support_offsets")
