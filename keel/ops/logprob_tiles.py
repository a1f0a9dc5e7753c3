"""What `logprobs` makes of one tile of logits: the tiles themselves, what is kept of each row, and their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from keel.ops.matmul import linear
from keel.ops.support import TokenSupport, cut_logits


@dataclass(frozen=True)
class Tiles:
    """How logits are cut up: `tokens` rows by `words` columns, made in float32 if `wide`."""

    tokens: int
    words: int
    wide: bool

    @staticmethod
    def dtype(hidden: torch.Tensor) -> torch.dtype:
        """Of everything after the products."""
        return torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def of(self, length: int, step: int) -> Iterator[slice]:
        """Slices of at most `step` that cover `length`."""
        return (slice(start, min(start + step, length)) for start in range(0, length, step))


@dataclass(frozen=True)
class Head:
    """What makes tiles of scaled logits, forward and backward alike."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    temperature: torch.Tensor | None
    support: TokenSupport | None
    tiles: Tiles

    @property
    def dtype(self) -> torch.dtype:
        """Of everything after the products."""
        return self.tiles.dtype(self.hidden)

    def product_type(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` in the type in which products are made."""
        return tensor.to(self.dtype) if self.tiles.wide else tensor

    def statistics(self, *, with_entropy: bool) -> Statistics:
        """Of no words yet."""
        kind = WholeRows if self.weight.shape[0] <= self.tiles.words else Statistics
        return kind.empty(self.hidden.shape[0], self.hidden, self.dtype, with_entropy=with_entropy)

    def words(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor | None]]:
        """Each tile of the vocabulary with its weights `[b, Hd]` and biases, in the type of the products."""
        for words in self.tiles.of(self.weight.shape[0], self.tiles.words):
            bias = None if self.bias is None else self.product_type(self.bias[words])
            yield words, self.product_type(self.weight[words]), bias

    def rows(self) -> Iterator[slice]:
        """Each chunk of tokens."""
        return self.tiles.of(self.hidden.shape[0], self.tiles.tokens)

    def logits(self, rows: slice, words: slice, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`[n, b]`: over temperature, -inf where cut."""
        z = linear(self.product_type(self.hidden[rows]), weight, bias).to(self.dtype)
        if self.temperature is not None:
            z = z.div_(self.temperature[rows, None].to(z.dtype))
        return z if self.support is None else cut_logits(z, self.support, rows.start, first_id=words.start)


@dataclass
class Statistics:
    """Of each row, over the words seen so far: the highest logit, the sum of exp(z - highest), the sum of
    exp(z - highest) * (z - highest) if entropy is wanted, and the label's logit; all `[T]`."""

    highest: torch.Tensor
    total: torch.Tensor
    weighted: torch.Tensor | None
    of_label: torch.Tensor

    @classmethod
    def empty(cls, num_rows: int, like: torch.Tensor, dtype: torch.dtype, *, with_entropy: bool) -> Statistics:
        """Of no words."""
        zeros = torch.zeros(num_rows, dtype=dtype, device=like.device)
        lowest = torch.full_like(zeros, torch.finfo(dtype).min)  # not -inf: its difference from itself is 0
        return cls(lowest, zeros, zeros.clone() if with_entropy else None, torch.full_like(zeros, -torch.inf))

    def add(self, z: torch.Tensor, rows: slice, labels: torch.Tensor, words: slice, *, cut: bool) -> None:
        """Take in a tile of logits `[n, b]`, which is consumed."""
        inside = (labels >= words.start) & (labels < words.stop)
        column = torch.where(inside, labels - words.start, 0)
        self.of_label[rows] = torch.where(inside, z.gather(1, column[:, None])[:, 0], self.of_label[rows])
        highest = torch.maximum(self.highest[rows], z.amax(-1))
        lower = self.highest[rows] - highest
        faded = torch.exp(lower)
        below = z.sub_(highest[:, None])
        e = below.exp()
        if self.weighted is not None:
            if cut:
                below.masked_fill_(below.isneginf(), 0.0)  # times an e of 0 it must be 0
            moved = faded * (self.weighted[rows] + self.total[rows] * lower)
            self.weighted[rows] = moved + below.mul_(e).sum(-1)
        self.total[rows] = self.total[rows] * faded + e.sum(-1)
        self.highest[rows] = highest

    def logprobs(self) -> torch.Tensor:
        """`[T]`, -inf where a support leaves the label out."""
        return (self.of_label - self.highest) - self.total.log()

    def entropy(self) -> torch.Tensor:
        """Nats; empty if it was not wanted."""
        if self.weighted is None:
            return self.total.new_empty(0)
        return self.total.log() - self.weighted / self.total

    def shares(self, z: torch.Tensor, rows: slice) -> torch.Tensor:
        """What softmax makes of a tile of logits, once all were taken in; the tile is consumed."""
        return z.sub_(self.highest[rows, None]).exp_().div_(self.total[rows, None])

    def log_shares(self, z: torch.Tensor, rows: slice) -> torch.Tensor:
        """Its logarithm; the tile is consumed."""
        return z.sub_(self.highest[rows, None]).sub_(self.total[rows, None].log())


@dataclass
class WholeRows(Statistics):
    """Of rows that are one tile: torch's own softmax, whose bits an engine has too."""

    def add(self, z: torch.Tensor, rows: slice, labels: torch.Tensor, words: slice, *, cut: bool) -> None:  # noqa: ARG002
        """Take in whole rows of logits `[n, V]`."""
        log_p = torch.log_softmax(z, dim=-1)
        self.of_label[rows] = log_p.gather(1, labels[:, None])[:, 0]
        if self.weighted is not None:
            p = log_p.exp()
            self.weighted[rows] = p.mul_(log_p.masked_fill_(log_p.isneginf(), 0.0) if cut else log_p).sum(-1)

    def logprobs(self) -> torch.Tensor:
        """`[T]`, -inf where a support leaves the label out."""
        return self.of_label

    def entropy(self) -> torch.Tensor:
        """Nats; empty if it was not wanted."""
        return self.total.new_empty(0) if self.weighted is None else self.weighted.neg()

    def shares(self, z: torch.Tensor, rows: slice) -> torch.Tensor:  # noqa: ARG002
        """What softmax makes of whole rows of logits."""
        return torch.softmax(z, dim=-1)

    def log_shares(self, z: torch.Tensor, rows: slice) -> torch.Tensor:  # noqa: ARG002
        """Its logarithm."""
        return torch.log_softmax(z, dim=-1)


@dataclass(frozen=True)
class HeadBackward:
    """Gradients of logits from those of log-probs and entropy; formulas at the top of `logprobs`. All are `[T]`."""

    labels: torch.Tensor
    entropy: torch.Tensor
    found: Statistics
    grad_logprobs: torch.Tensor | None
    grad_entropy: torch.Tensor | None

    def tile(self, z: torch.Tensor, rows: slice, words: slice, *, cut: bool) -> torch.Tensor:
        """Gradient `[n, b]` of a tile of scaled logits, which is consumed."""
        if self.grad_logprobs is None and self.grad_entropy is None:
            return z.zero_()
        if self.grad_entropy is None:
            grad = self.found.shares(z, rows).mul_(-self._of_logprobs(rows))
        else:
            log_p = self.found.log_shares(z, rows)
            p = log_p.exp()
            if cut:
                log_p.masked_fill_(log_p.isneginf(), 0.0)  # times a share of 0 it must be 0
            weight = log_p.add_(self.entropy[rows, None]).mul_(self.grad_entropy[rows, None])
            grad = p.mul_(weight.add_(self._of_logprobs(rows)).neg_())
        if self.grad_logprobs is not None:
            labels = self.labels[rows]
            row = ((labels >= words.start) & (labels < words.stop)).nonzero()[:, 0]
            grad[row, labels[row] - words.start] += self.grad_logprobs[rows][row]
        return grad

    def _of_logprobs(self, rows: slice) -> torch.Tensor | float:
        return 0.0 if self.grad_logprobs is None else self.grad_logprobs[rows, None]
