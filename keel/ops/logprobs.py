"""Log-probs and entropy of given tokens straight from hidden states, without holding `[T, V]` in float32.

The head's product is made a chunk of tokens at a time, and made again in the backward pass. With
z = logits / temperature and p = softmax(z):

    logprob = z[label] - logsumexp(z)          d logprob / dz = onehot(label) - p
    entropy = -sum(p * log p)                  d entropy / dz = -p * (log p + entropy)

Where top-p or top-k cut the distribution that a label was drawn from, logits outside what was left are -inf, and all of
this holds over the rest alone.

A row's bits depend on the chunk it is computed in and on nothing that comes after it, so the same micro-batch gives the
same bits with and without a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from keel.ops.matmul import linear, product
from keel.ops.support import TokenSupport, check_support, cut_logits

DEFAULT_CHUNK_TOKENS = 1024


def head_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`hidden [T, Hd]` times the head `weight [V, Hd]`: logits `[T, V]`, float32 (float64 stays float64)."""
    logits = linear(hidden, weight, bias)
    return logits if logits.dtype == torch.float64 else logits.float()


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    support: TokenSupport | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
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
        with_entropy: False returns None in its place and saves its two passes.
        entropy_grad: let gradients flow through the entropy too (an entropy bonus); off, it is detached.

    Returns:
        `(logprobs [T], entropy [T] or None)` in nats, float32; float64 if `hidden` is.

    Raises:
        ValueError: shapes that do not fit, chunk_tokens < 1, a temperature that is not positive, ids of a support
            that are not in the vocabulary.
    """
    _check(hidden, weight, labels, temperature, bias, chunk_tokens)
    if support is not None:
        check_support(support, hidden.shape[0], weight.shape[0])
    logprobs, entropy = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, labels, temperature, support, chunk_tokens, with_entropy or entropy_grad
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
    chunk_tokens: int,
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
    if chunk_tokens < 1:
        raise ValueError(f"linear_logprobs: got chunk_tokens {chunk_tokens}; needs at least 1")
    if temperature is not None and temperature.numel() and not bool((temperature > 0).all()):
        raise ValueError(
            f"linear_logprobs: got temperature {float(temperature.min())}; it must be positive. A token drawn greedily "
            "(temperature 0) has no distribution to train on: sample with a positive temperature"
        )


def scaled_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: torch.Tensor | None, rows: slice
) -> torch.Tensor:
    """Logits of one chunk over its temperatures, `[n, V]`, nothing cut; forward and backward make them alike."""
    logits = head_logits(hidden[rows], weight, bias)
    return logits if temperature is None else logits.div_(temperature[rows, None].to(logits.dtype))


class _LinearLogprobs(torch.autograd.Function):
    """Chunked forward, recomputing backward. The entropy output is empty when it is not asked for."""

    @staticmethod
    def forward(  # noqa: PLR0917 (torch hands them over by position)
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        temperature: torch.Tensor | None,
        support: TokenSupport | None,
        chunk_tokens: int,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens = hidden.shape[0]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(num_tokens, dtype=dtype, device=hidden.device)
        entropy = torch.empty(num_tokens if with_entropy else 0, dtype=dtype, device=hidden.device)
        for start in range(0, num_tokens, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            scaled = scaled_logits(hidden, weight, bias, temperature, rows)
            if support is not None:
                cut_logits(scaled, support, start)
            log_p = torch.log_softmax(scaled, dim=-1)
            logprobs[rows] = log_p.gather(1, labels[rows, None])[:, 0]
            if with_entropy:
                p = log_p.exp()
                entropy[rows] = p.mul_(_of_the_left(log_p, support)).sum(-1).neg_()
        ctx.save_for_backward(hidden, weight, bias, labels, temperature, entropy)
        ctx.support = support
        ctx.chunk_tokens = chunk_tokens
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None) -> Any:
        hidden, weight, bias, labels, temperature, entropy = ctx.saved_tensors
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=wide, device=weight.device) if need_bias else None
        for start in range(0, hidden.shape[0], ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            scaled = scaled_logits(hidden, weight, bias, temperature, rows)
            if ctx.support is not None:
                cut_logits(scaled, ctx.support, start)
            grad_logits = _grad_scaled(
                scaled, labels[rows], _rows(grad_logprobs, rows), _rows(grad_entropy, rows), entropy[rows], ctx.support
            )
            if temperature is not None:
                grad_logits.div_(temperature[rows, None].to(wide))
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
            # The products in the type of the forward pass; their sum over chunks in float32.
            narrow = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = product(narrow, weight, rows=narrow.shape[0])
            if grad_weight is not None:
                grad_weight += product(narrow.t(), hidden[rows], rows=narrow.shape[0])
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def _of_the_left(log_p: torch.Tensor, support: TokenSupport | None) -> torch.Tensor:
    """`log_p [n, V]` with 0 for what was cut away, in place: times a probability of 0 it must be 0."""
    return log_p if support is None else log_p.masked_fill_(log_p.isneginf(), 0.0)


def _rows(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]


def _grad_scaled(
    scaled: torch.Tensor,
    labels: torch.Tensor,
    grad_logprobs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    entropy: torch.Tensor,
    support: TokenSupport | None,
) -> torch.Tensor:
    """Gradient of one chunk with respect to its scaled logits `[n, V]`; formulas at the top of the file."""
    if grad_entropy is None:
        p = torch.softmax(scaled, dim=-1)
        if grad_logprobs is None:
            return p.zero_()
        grad = p.mul_(grad_logprobs[:, None].neg())
    else:
        log_p = torch.log_softmax(scaled, dim=-1)
        p = log_p.exp()
        weight = _of_the_left(log_p, support).add_(entropy[:, None]).mul_(grad_entropy[:, None])
        if grad_logprobs is not None:
            weight = weight.add_(grad_logprobs[:, None])
        grad = p.mul_(weight.neg_())
    if grad_logprobs is not None:
        grad[torch.arange(labels.shape[0], device=labels.device), labels] += grad_logprobs
    return grad
