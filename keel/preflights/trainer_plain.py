"""A trainer in plain `transformers`: `AutoModelForCausalLM`, padded batches, an attention mask, nothing of Keel's.

An attention of Keel's own ("keel") is registered with `transformers` first, since a trainer may well use that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from keel.models.info import model_info
from keel.models.policy import DTYPES
from keel.models.progress import no_progress_bars
from keel.preflights.stack import Floats, ModelSource, ScoredSequence, TrainerScores
from keel.types import UserFault

BATCH = 4
"""Sequences to a padded batch."""


class TrainerError(UserFault, ValueError):
    """The trainer's model cannot be had as it was asked for; says what, got and fix."""


class PlainTrainer:
    """`TrainerSide` over a `transformers` model: right-padded batches of `BATCH`, log-softmax in float32."""

    name = "transformers"

    def __init__(self, model: Any, *, dtype: str, attention: str):
        self.model, self.dtype, self.attention = model, dtype, attention
        self.info = model_info(model.config)
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, source: ModelSource, *, attention: str, device: torch.device | str = "cpu") -> PlainTrainer:
        """Raises TrainerError for a model, an attention or a type that `transformers` does not have."""
        from transformers import AutoModelForCausalLM

        if source.dtype not in DTYPES:
            raise TrainerError(f"dtype: got {source.dtype!r}; known: {', '.join(DTYPES)}")
        if attention == "keel":
            from keel.models import attention as keel_attention

            keel_attention.register()
        try:
            with no_progress_bars():
                model = AutoModelForCausalLM.from_pretrained(
                    source.path,
                    dtype=DTYPES[source.dtype],
                    attn_implementation=attention,
                    trust_remote_code=source.trust_remote_code,
                    revision=source.revision or "main",
                )
        except (OSError, ValueError, ImportError, AttributeError, KeyError) as error:
            raise TrainerError(
                f"the trainer's model {source.path!r} cannot be loaded with attention {attention!r} in {source.dtype}: "
                f"{error}; give a directory or hub id of a causal model and an attention that it takes"
            ) from error
        return cls(model.to(device).eval(), dtype=source.dtype, attention=attention)

    def score(self, sequences: Sequence[ScoredSequence], *, with_routes: bool = False) -> list[TrainerScores]:  # noqa: ARG002 (a plain model records none)
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].token_ids))
        found: dict[int, TrainerScores] = {}
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            rows = self.batch_logprobs([sequences[index] for index in chosen], padded="right")
            found |= {index: TrainerScores(row) for index, row in zip(chosen, rows, strict=True)}
        return [found[index] for index in range(len(sequences))]

    def score_alone(self, sequence: ScoredSequence) -> TrainerScores:
        return TrainerScores(self.batch_logprobs([sequence], padded="right")[0])

    def loss_gradient(self, sequences: Sequence[ScoredSequence]) -> Mapping[str, float]:
        self.model.zero_grad(set_to_none=True)
        try:
            for sequence in sequences:
                logprobs = self._row_logprobs(sequence, self._logits([sequence], padded="right")[0])
                drawn = torch.from_numpy(sequence.drawn[1:]).to(logprobs.device)
                logprobs[drawn].sum().backward()
            return {
                name: 0.0 if parameter.grad is None else float(parameter.grad.float().norm())
                for name, parameter in self.model.named_parameters()
            }
        finally:
            self.model.zero_grad(set_to_none=True)

    def batch_logprobs(self, sequences: Sequence[ScoredSequence], *, padded: str) -> list[Floats]:
        """Log-probs `[n]` of one padded batch; `padded` is "left" or "right"."""
        with torch.no_grad():
            logits = self._logits(sequences, padded=padded)
            rows = [self._row_logprobs(each, row) for each, row in zip(sequences, logits, strict=True)]
        return [np.concatenate([np.full(1, np.nan, np.float32), row.float().cpu().numpy()]) for row in rows]

    def _logits(self, sequences: Sequence[ScoredSequence], *, padded: str) -> list[torch.Tensor]:
        """Logits `[n, V]` of each, the padding cut off again."""
        longest = max(len(each.token_ids) for each in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        places = []
        for row, each in enumerate(sequences):
            size = len(each.token_ids)
            place = slice(0, size) if padded == "right" else slice(longest - size, longest)
            ids[row, place], mask[row, place] = torch.from_numpy(each.token_ids), 1
            places.append(place)
        position_ids = (mask.cumsum(1) - 1).clamp_min(0)
        out = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=position_ids.to(self.device),
            use_cache=False,
        )
        return [out.logits[row, place] for row, place in enumerate(places)]

    @staticmethod
    def _row_logprobs(sequence: ScoredSequence, logits: torch.Tensor) -> torch.Tensor:
        """`[n - 1]` log-probs of tokens 1 .. n - 1: drawn ones over the temperature, and over the support if known."""
        scaled = logits[:-1].float()
        drawn = torch.from_numpy(sequence.drawn[1:]).to(scaled.device)
        temperature = sequence.sampling.temperature or 1.0
        scaled = torch.where(drawn[:, None], scaled / temperature, scaled)
        if sequence.support is not None:
            scaled = scaled.masked_fill(_left_out(sequence, scaled.shape[1]).to(scaled.device), -torch.inf)
        labels = torch.from_numpy(sequence.token_ids[1:]).to(scaled.device)
        return torch.log_softmax(scaled, -1).gather(1, labels[:, None])[:, 0]


def _left_out(sequence: ScoredSequence, vocab_size: int) -> torch.Tensor:
    """`[n - 1, V]` bool: what top-k and top-p left out of each drawn token's choice."""
    assert sequence.support is not None
    out = np.zeros((len(sequence.token_ids) - 1, vocab_size), np.bool_)
    ids = np.frombuffer(sequence.support.ids, np.uint32).astype(np.int64)
    at = 0
    for row, count in zip(np.flatnonzero(sequence.drawn[1:]), sequence.support.counts, strict=True):
        if count:
            out[row] = True
            out[row, ids[at : at + count]] = False
        at += count
    return torch.from_numpy(out)
