"""A learned sink per head, added to any plain attention's (out, lse) after the fact.

A sink s is one more entry in the softmax, without a value vector. It only enlarges the denominator:

    lse' = logaddexp(lse, s)          out' = out * exp(lse - lse')

Source: the attention of GPT-OSS (OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025); after Xiao et al., "Efficient
Streaming Language Models with Attention Sinks", 2023, arXiv:2309.17453.
"""

from __future__ import annotations

import torch

ROWS = 1024


def apply_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, H, D], lse [T, H], sinks [H]) -> the same with the sink in the denominator; lse is a natural log.

    A row without a visible key, (0, -inf), becomes (0, s). Parts of one softmax (a ring's) are merged first, and the
    sink is added once, at the end.
    """
    factor, with_sink = sink_factor(lse, sinks)
    return (out * factor).to(out.dtype), with_sink


def sink_factor(lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `out` is multiplied by, [T, H, 1], and the lse [T, H] with the sink in it."""
    if sinks.shape != lse.shape[-1:]:
        raise ValueError(f"sinks must be [H] = [{lse.shape[-1]}], got {list(sinks.shape)}; split sinks with the heads")
    with_sink = torch.logaddexp(lse, sinks.to(lse.dtype))
    return torch.exp(lse - with_sink).unsqueeze_(-1), with_sink


def sinks_gradient(grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """ds [H] = - sum over rows of exp(s - lse') * rowsum(grad * out'), from the (out', lse') that hold the sink."""
    probability = torch.exp(sinks.to(lse.dtype) - lse)  # [T, H]
    # A stretch of rows at a time: the products stay in a core's cache, and no second [T, H, D] is made.
    stretches = zip(grad.split(ROWS), out.split(ROWS), strict=True)
    delta = [(part.to(lse.dtype) * values.to(lse.dtype)).sum(-1) for part, values in stretches]  # [T, H]
    return -(probability * torch.cat(delta)).sum(0).to(sinks.dtype)
