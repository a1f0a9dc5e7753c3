"""What the attribution looks at: one side's log-probs of the drawn tokens, flat, and what a model's logits say of them.

Letters: N drawn tokens in all, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from keel.causes import Side
from keel.preflights.reference import Feed
from keel.preflights.stack import ProbeData, ProbeSequence
from keel.types import Support

Array = npt.NDArray[np.float64]
FURTHEST_SHIFT = 2


@dataclass(frozen=True)
class StackFacts:
    """What is known of the stack besides its log-probs.

    `dtype` is what both sides claim to compute in. `earlier` holds weights of earlier versions, newest first, by the
    parameter names of the `transformers` model (a version may leave out what did not change). `tokenizer` has
    `decode(ids) -> str` and `encode(text) -> ids`.
    """

    dtype: str = "float32"
    stop_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    tokenizer: Any = None
    earlier: tuple[Mapping[str, torch.Tensor], ...] = ()


@dataclass(frozen=True)
class Readout:
    """How log-probs are taken from logits. `temperature` None: the one asked for; `cut`: top-k and top-p are replayed.

    `top_p`: what is cut is decided by this one instead. `shift` k: at a token stands the log-prob of the token k places
    on. `replies` (sequence, turn) are those read in this way, the others as asked; None: all.
    """

    temperature: float | None = None
    cut: bool = True
    top_p: float | None = None
    shift: int = 0
    rounded: bool = False
    replies: frozenset[tuple[int, int]] | None = None


class Evidence:
    """All drawn tokens of the probes, in one order: sequence after sequence, position after position."""

    def __init__(self, data: ProbeData) -> None:
        self.sequences: tuple[ProbeSequence, ...] = data.sequences
        self._trainer = data.trainer
        self.sequence = np.concatenate([np.full(int(s.drawn.sum()), i) for i, s in enumerate(self.sequences)])
        self.position = np.concatenate([np.flatnonzero(s.drawn) for s in self.sequences])
        self.turn = np.concatenate([s.turn[s.drawn] for s in self.sequences])
        self.tokens = np.concatenate([s.token_ids[s.drawn] for s in self.sequences])
        self.temperature = np.concatenate([np.full(int(s.drawn.sum()), s.sampling.temperature) for s in self.sequences])
        self.replies = list(zip(self.sequence.tolist(), self.turn.tolist(), strict=True))
        self.is_cut = any(s.sampling.top_p < 1.0 or s.sampling.top_k > 0 for s in self.sequences)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def of(self, side: Side) -> Array | None:
        """`[N]` log-probs of `side`; nan where one is missing, None if all are."""
        if side == "learner":
            if not self._trainer:
                return None
            parts = [scores.logprobs[s.drawn] for s, scores in zip(self.sequences, self._trainer, strict=True)]
        else:
            parts = [s.engine_logprobs[s.drawn] for s in self.sequences]
        values = np.concatenate(parts).astype(np.float64)
        if side == "learner":
            ends = [places for index in range(len(self.sequences)) for places in self._is_lost(index)]
            values[ends] = np.nan
        return values if np.isfinite(values).any() else None

    def lost_ends(self, index: int) -> list[int]:
        """Places of last tokens of replies that the learner gives a log-prob of exactly 0: it was not shown them."""
        if not self._trainer or self.sequences[index].sampling.temperature == 0:
            return []
        told = self._trainer[index].logprobs
        ends = [reply.stop - 1 for reply in self.sequences[index].replies if reply.stop > reply.start]
        return [end for end in ends if told[end] == 0.0]

    def _is_lost(self, index: int) -> list[int]:
        lost = self.lost_ends(index)
        return np.flatnonzero((self.sequence == index) & np.isin(self.position, lost)).tolist() if lost else []

    def all_of(self, side: Side, index: int) -> Array | None:
        """`[n]` log-probs at temperature 1 of sequence `index`, context included, where `side` gives them."""
        if side == "engine":
            scores = self.sequences[index].engine_scores
        else:
            scores = self._trainer[index].logprobs if self._trainer else None
        return None if scores is None else scores.astype(np.float64)

    def routes_of(self, side: Side, index: int) -> npt.NDArray[np.int32] | None:
        """`[n - 1, moe layers, k]` expert choices of sequence `index`, where `side` tells."""
        if side == "engine":
            return self.sequences[index].routes
        return self._trainer[index].routes if self._trainer else None

    def feeds(self) -> list[Feed]:
        """Every sequence as it is shown to the learner, with the rows that `Rows` reads."""
        found = []
        for sequence in self.sequences:
            tokens = tuple(int(token) for token in sequence.token_ids)
            found.append(Feed(tokens, tuple(place - 1 for place in self.places(sequence))))
        return found

    @staticmethod
    def places(sequence: ProbeSequence) -> list[int]:
        """Tokens whose log-probs are wanted: the drawn ones."""
        return [int(place) for place in np.flatnonzero(sequence.drawn)]


class Rows:
    """Log-probs of the evidence's tokens, taken from logits `[N, V]` in the order of `Evidence.feeds`."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        labels: list[int] = []
        temperatures: list[float] = []
        where: dict[tuple[int, int], int] = {}
        for index, sequence in enumerate(evidence.sequences):
            for place in evidence.places(sequence):
                where[index, place] = len(labels)
                labels.append(int(sequence.token_ids[place]))
                temperatures.append(sequence.sampling.temperature)
        self.labels = torch.tensor(labels, dtype=torch.long)
        self.temperatures = torch.tensor(temperatures, dtype=torch.float32)
        self._where = where
        self._shifted = {shift: self._drawn_rows(shift) for shift in range(-FURTHEST_SHIFT, FURTHEST_SHIFT + 1)}
        self.allowed: torch.Tensor | None = None

    def _drawn_rows(self, shift: int) -> npt.NDArray[np.int64]:
        """`[N]` row of each drawn token, or of the one `shift` places on in the same reply; -1 where there is none."""
        rows = []
        for index, place in zip(self.evidence.sequence.tolist(), self.evidence.position.tolist(), strict=True):
            turn, other = self.evidence.sequences[index].turn, place + shift
            same = 0 <= other < len(turn) and turn[other] == turn[place]
            rows.append(self._where[index, other] if same else -1)
        return np.array(rows, dtype=np.int64)

    def keep_support(self, logits: torch.Tensor) -> None:
        """Fix what top-k and top-p leave, by what the engine says of it, else by the reference's `logits [N, V]`."""
        if not self.evidence.is_cut:
            return
        allowed = torch.ones(logits.shape, dtype=torch.bool)
        for index, sequence in enumerate(self.evidence.sequences):
            rows = [self._where[index, place] for place in self.evidence.places(sequence)]
            settings = sequence.sampling
            scaled = logits[rows] / max(settings.temperature, 1e-6)
            allowed[rows] = _support(scaled, settings.top_k, settings.top_p)
            if sequence.support is not None:
                drawn = [self._where[index, place] for place in np.flatnonzero(sequence.drawn).tolist()]
                _put_in(allowed, drawn, sequence.support)
        allowed[torch.arange(len(self.labels)), self.labels] = True
        self.allowed = allowed

    def _cut_at(self, scaled: torch.Tensor, top_p: float) -> torch.Tensor:
        top_k = self.evidence.sequences[0].sampling.top_k
        allowed = _support(scaled, top_k, top_p)
        allowed[torch.arange(len(self.labels)), self.labels] = True
        return allowed

    def logprobs(self, logits: torch.Tensor, readout: Readout | None = None) -> Array:
        """`[N]` log-probs of the drawn tokens under `readout`; nan where a shift leaves the sequence."""
        readout = readout or Readout()
        scale = self.temperatures
        if readout.temperature is not None:
            scale = torch.full_like(self.temperatures, readout.temperature)
        scaled = logits / scale.clamp(min=1e-6)[:, None]
        if readout.rounded:
            scaled = scaled.bfloat16().float()
        allowed = self.allowed if readout.cut else None
        if readout.top_p is not None:
            allowed = self._cut_at(scaled, readout.top_p)
        if allowed is not None:
            scaled = scaled.masked_fill(~allowed, -torch.inf)
        picked = scaled.gather(1, self.labels[:, None])[:, 0] - scaled.logsumexp(dim=1)
        values = picked.double().numpy()
        rows = self._shifted[readout.shift]
        return np.where(rows >= 0, values[rows], np.nan)


def _support(scaled: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """`[N, V]` bool: what is left of softmax(scaled) after top-k, then top-p (the token that reaches p stays in)."""
    ordered, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True)
    if top_k:
        ordered[:, top_k:] = 0.0
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = (before < top_p) & (ordered > 0)
    return torch.zeros_like(kept).scatter(1, order, kept)


def _put_in(allowed: torch.Tensor, rows: Sequence[int], support: Support) -> None:
    ids, start = np.frombuffer(support.ids, dtype=np.uint32), 0
    for row, count in zip(rows, support.counts, strict=True):
        if count:
            allowed[row] = False
            allowed[row, torch.from_numpy(ids[start : start + count].astype(np.int64))] = True
            start += count
        else:
            allowed[row] = True
