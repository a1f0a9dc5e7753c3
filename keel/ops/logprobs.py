"""Log-probs and entropy of given tokens straight from hidden states; no `[T, V]` is ever held, nor a row of it.

The head's product is made a tile at a time, `chunk_tokens` tokens by `VOCABULARY_TILE` words, and made again in the
backward pass. With z = logits / temperature, and m and s the running maximum of a row and sum of exp(z - m) (the online
softmax of Milakov and Gimelshein 2018, arXiv 1805.02867):

    logprob = z[label] - m - log(s)            d logprob / dz = onehot(label) - p        p = exp(z - m) / s
    entropy = log(s) - sum(exp(z - m) * (z - m)) / s          d entropy / dz = -p * (log p + entropy)

Vocabulary is the outer loop: the gradient of a tile of the head is finished before the next is begun, so beyond
weights, inputs and their gradients there are a few tiles of memory, whatever V and T.

Where top-p or top-k cut the distribution that a label was drawn from, logits outside what was left are -inf, and all of
this holds over the rest alone.

A row's bits depend on the chunk it is computed in and on nothing that comes after it, so the same micro-batch gives the
same bits with and without a gradient. Where a row is one tile, as in exact mode and for small vocabularies, its
log-prob is what torch's softmax makes of it, as in an engine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from keel.ops.logprob_tiles import Head, HeadBackward, Tiles
from keel.ops.matmul import linear, product
from keel.ops.numerics import is_exact
from keel.ops.support import TokenSupport, check_support

DEFAULT_CHUNK_TOKENS = 1024
VOCABULARY_TILE = 2048
"""Words whose logits, and whose gradients of the head, are alive at once."""


def head_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, float32_products: bool = False
) -> torch.Tensor:
    """`hidden [T, Hd]` times the head `weight [V, Hd]`: logits `[T, V]`, float32 (float64 stays float64).

    `float32_products` as in `linear_logprobs`.
    """
    tiles = Tiles(hidden.shape[0], weight.shape[0] if is_exact() else VOCABULARY_TILE, float32_products)
    if not float32_products or hidden.dtype in (torch.float32, torch.float64):
        return linear(hidden, weight, bias).to(tiles.dtype(hidden))
    wide = hidden.float()
    parts = [
        linear(wide, weight[words].float(), None if bias is None else bias[words].float())
        for words in tiles.of(weight.shape[0], tiles.words)
    ]
    return torch.cat(parts, dim=-1)


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    support: TokenSupport | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    vocabulary_tile: int = VOCABULARY_TILE,
    float32_products: bool = False,
    with_entropy: bool = True,
    entropy_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-prob of each label, and the entropy of its distribution, under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: `[T, Hd]`, any floating type; the products are made in it, everything after in float32.
        weight: `[V, Hd]`, the head, of the same type.
        labels: `[T]` int64, each in 0 .. V - 1.
        temperature: `[T]`, positive; None is 1 everywhere.
        bias: `[V]` or None.
        support: what each label was chosen from, itself included; None: from the whole vocabulary.
        chunk_tokens: rows of logits alive at once.
        vocabulary_tile: columns of logits alive at once; in exact mode all are.
        float32_products: make the head's products in float32 where `hidden` is narrower, a tile at a time: logits are
            then not rounded to its type.
        with_entropy: False returns None in its place and saves its two passes.
        entropy_grad: let gradients flow through the entropy too (an entropy bonus); off, it is detached.

    Returns:
        `(logprobs [T], entropy [T] or None)` in nats, float32; float64 if `hidden` is.

    Raises:
        ValueError: shapes that do not fit, chunk_tokens or vocabulary_tile < 1, a temperature that is not positive,
            ids of a support that are not in the vocabulary.
    """
    _check(hidden, weight, labels, temperature, bias, min(chunk_tokens, vocabulary_tile))
    if support is not None:
        check_support(support, hidden.shape[0], weight.shape[0])
    if temperature is not None and bool((temperature == 1).all()):
        temperature = None
    tiles = Tiles(chunk_tokens, weight.shape[0] if is_exact() else vocabulary_tile, float32_products)
    logprobs, entropy = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, temperature, support, tiles, with_entropy or entropy_grad
    )
    if not with_entropy:
        return logprobs, None
    return logprobs, entropy if entropy_grad else entropy.detach()


def linear_logprobs_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    support: TokenSupport | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The slow twin of `linear_logprobs`: whole `[T, V]` logits in float64 and torch's own autograd.

    Of a cut row only what was left is looked at.
    """
    logits = functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    if temperature is not None:
        logits = logits / temperature.double()[:, None]
    if support is None:
        log_p = torch.log_softmax(logits, dim=-1)
        return log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    logprobs, entropies = list[torch.Tensor](), list[torch.Tensor]()
    for row, label in zip(logits, labels.tolist(), strict=True):
        at = len(logprobs)
        left = support.ids[int(support.offsets[at]) : int(support.offsets[at + 1])].tolist() or range(len(row))
        log_p = torch.log_softmax(row[list(left)], dim=-1)
        logprobs.append(log_p[list(left).index(label)])
        entropies.append(-(log_p.exp() * log_p).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    smallest: int,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_logprobs: got hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}; "
            "needs [T, Hd] and [V, Hd]"
        )
    for name, tensor, length in (
        ("labels", labels, hidden.shape[0]),
        ("temperature", temperature, hidden.shape[0]),
        ("bias", bias, weight.shape[0]),
    ):
        if tensor is not None and tuple(tensor.shape) != (length,):
            raise ValueError(f"linear_logprobs: got {name} {tuple(tensor.shape)}; needs [{length}]")
    if smallest < 1:
        raise ValueError(f"linear_logprobs: got tiles of {smallest}; chunk_tokens and vocabulary_tile start at 1")
    if temperature is not None and temperature.numel() and not bool((temperature > 0).all()):
        raise ValueError(
            f"linear_logprobs: got temperature {float(temperature.min())}; it must be positive. A token drawn greedily "
            "(temperature 0) has no distribution to train on: sample with a positive temperature"
        )


def scaled_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: torch.Tensor | None,
    rows: slice,
    *,
    float32_products: bool = False,
) -> torch.Tensor:
    """Logits of one chunk over its temperatures, `[n, V]`, nothing cut; those that `linear_logprobs` makes."""
    logits = head_logits(hidden[rows], weight, bias, float32_products=float32_products)
    return logits if temperature is None else logits.div_(temperature[rows, None].to(logits.dtype))


class _LinearLogprobs(torch.autograd.Function):
    """Tiled forward, recomputing backward. The entropy output is empty when it is not asked for."""

    @staticmethod
    def forward(  # noqa: PLR0917 (torch hands them over by position)
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        temperature: torch.Tensor | None,
        support: TokenSupport | None,
        tiles: Tiles,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = Head(hidden, weight, bias, temperature, support, tiles)
        found = head.statistics(with_entropy=with_entropy)
        for words, weights, biases in head.words():
            for rows in head.rows():
                z = head.logits(rows, words, weights, biases)
                found.add(z, rows, labels[rows], words, cut=support is not None)
        logprobs, entropy = found.logprobs(), found.entropy()
        found.of_label = entropy.new_empty(0)  # an output that its own backward pass holds would be a cycle
        ctx.save_for_backward(hidden, weight, bias, labels, temperature, entropy)
        ctx.support, ctx.tiles, ctx.found = support, tiles, found
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None) -> Any:
        hidden, weight, bias, labels, temperature, entropy = ctx.saved_tensors
        head = Head(hidden, weight, bias, temperature, ctx.support, ctx.tiles)
        back = HeadBackward(labels, entropy, ctx.found, grad_logprobs, grad_entropy)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros(hidden.shape, dtype=head.dtype, device=hidden.device) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.empty_like(bias) if need_bias else None
        for words, weights, biases in head.words():
            of_weight: torch.Tensor | None = None
            of_bias: torch.Tensor | None = None
            for rows in head.rows():
                grad = back.tile(head.logits(rows, words, weights, biases), rows, words, cut=ctx.support is not None)
                if temperature is not None:
                    grad.div_(temperature[rows, None].to(grad.dtype))
                if grad_bias is not None:
                    of_bias = _plus(of_bias, grad.sum(0))
                # The products in the type of the forward pass; their sums in float32.
                narrow = grad.to(weights.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] += product(narrow, weights, rows=narrow.shape[0])
                if grad_weight is not None:
                    made = product(narrow.t(), head.product_type(hidden[rows]), rows=narrow.shape[0])
                    of_weight = _plus(of_weight, made)
            for grads, of_words in ((grad_weight, of_weight), (grad_bias, of_bias)):
                if grads is not None:
                    grads[words] = 0.0 if of_words is None else of_words
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _plus(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """A sum over chunks, kept in float32 at least; the first part is consumed."""
    wide = part if part.dtype == torch.float64 else part.float()
    return wide if total is None else total.add_(wide)
